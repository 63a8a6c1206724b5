"""``diffalign serve-rewards``: serve rewards over HTTP to other processes and machines."""

import os
import sys
import time
from collections.abc import Sequence
from threading import Thread

from diffalign.cli.common import device_name, make_parser, names, number, parse
from diffalign.errors import UserError


def run(argv: Sequence[str]) -> int:
    """Load rewards and serve them until interrupted; the address alone is printed on stdout."""
    parser = make_parser("serve-rewards", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--rewards", required=True, metavar="A,B", help="names of `diffalign rewards`, or NAME:FILE_OR_FOLDER"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1, this machine alone")
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=8765, help="0 picks a free one; default 8765"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=16, metavar="B", help="images at once; default 16"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default auto")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16; default float32")
    parser.add_argument(
        "--parent", type=number(int, 1), metavar="PID", help="end with this process, which started this one"
    )
    args = parse(parser, argv)
    specs = names(args.rewards, "--rewards")
    if args.parent is not None:
        if os.getppid() != args.parent:
            raise UserError(f"--parent {args.parent}; allowed: {os.getppid()}, which started this process")
        Thread(target=_end_with, args=(args.parent,), daemon=True).start()  # also while weights are loaded

    from diffalign.rewards.registry import load
    from diffalign.rewards.registry import parse as parse_spec
    from diffalign.rewards.serving.server import RewardServer, Served

    cards = [parse_spec(spec)[0] for spec in specs]
    for card in cards:
        if [other.name for other in cards].count(card.name) > 1:
            raise UserError(f"--rewards {args.rewards!r} has {card.name!r} twice; allowed: each name once")
    device = device_name(args.device)
    with RewardServer({}, args.host, args.port) as server:  # before weights are loaded: the port may be taken
        for card, spec in zip(cards, specs, strict=True):
            server.rewards[card.name] = Served(card, load(spec, device, args.dtype, args.batch_size))
        addresses = ", ".join(f"{server.address}/{name}" for name in server.rewards)
        try:
            print(f"serving {addresses}", file=sys.stderr)
            print("Ctrl-C ends it", file=sys.stderr, flush=True)
            print(server.address, flush=True)  # last: the reader of this line may interrupt from here on
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
    return 0


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, even by a kill: there is nothing to save."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


DESCRIPTION = """\
Serve rewards over HTTP and JSON. The address of a reward, such as http://127.0.0.1:8765/judge, is valid
wherever a reward is named: `diffalign score`, `evaluate`, rollout.rewards, data.rewards. GET / lists the
rewards. Images are sent as PNG, so they are rounded to 8 bits. There is no password: with --host 0.0.0.0
everybody who reaches the port can use it."""

EXAMPLES = """
diffalign serve-rewards --rewards judge,tiny_clip
diffalign serve-rewards --rewards pickscore --device cuda --dtype bfloat16 --host 0.0.0.0 --port 8765
diffalign score images/ --rewards http://127.0.0.1:8765/pickscore
"""
