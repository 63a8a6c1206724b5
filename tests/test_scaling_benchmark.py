"""The benchmark of processes: what a process notes, and the page by hand. It starts no launcher."""

import json

from benchmarks import scaling


def test_a_process_notes_wall_and_processor_time(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    scaling.child("tiny", 2, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processor"] > 0 and result["wall"] > 0


def test_the_page_compares_each_repetition_with_its_fellow():
    def row(processes, speed, cost):
        return {
            "processes": processes,
            "pairs_a_second": speed,
            "processor_a_pair": cost,
            "busy": 1.0,
            "load": 2.5,
        }

    rows = [
        row(1, 2.0, 0.5),
        row(2, 3.0, 0.6),
        row(1, 1.0, 0.5),
        row(2, 1.9, 0.5),
        row(1, 2.0, 0.4),
        row(2, 4.0, 0.4),
    ]
    text = scaling.page("mid", 6, rows)
    assert (
        "| 1 | 2.000 [1.000, 2.000] | 0.500 [0.400, 0.500] | 1.00 [1.00, 1.00] | 2.5 [2.5, 2.5] | 3 |" in text
    )
    assert "Two over one: 1.90 [1.50, 2.00] of the pairs a second, 1.00 [1.00, 1.20] of the processor" in text
    assert "would allow 2.00 [1.67, 2.00] of the pairs a second" in text
