"""The HTML report of an evaluation: tables, charts, image grids."""
