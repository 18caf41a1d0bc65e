"""SWC texts: a good one, what has one meaning, and what has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Put = Callable[..., Path]
"""Content, and a name if it matters -> the path of a file."""

GOOD = "1 1 0 0 0 5 -1\n2 3 6 0 0 1 1\n3 3 7 1 0 1 2\n4 3 6 9 2 0.5 2\n"

TOLERATED = {
    "Windows lines": GOOD.replace("\n", "\r\n"),
    "old Mac lines": GOOD.replace("\n", "\r"),
    "byte-order mark": "\ufeff" + GOOD,
    "UTF-16": GOOD.encode("utf-16"),
    "latin-1 comment": b"# \xb5m, by Ram\xf3n\n" + GOOD.encode(),
    "commas": GOOD.replace(" ", ", "),
    "bare commas": GOOD.replace(" ", ","),
    "semicolons": GOOD.replace(" ", ";"),
    "semicolons and decimal commas": GOOD.replace(" ", ";").replace("0.5", "0,5"),
    "semicolons, blanks and decimal commas": GOOD.replace(" ", " ; ").replace("0.5", ",5").replace("\n", ";\n"),
    "tabs and commas": GOOD.replace(" ", ",\t"),
    "ids of 63 bits": GOOD.replace("1 1 0", "9007199254740993 1 0").replace(" 1 1\n", " 1 9007199254740993\n"),
    "UTF-32": GOOD.encode("utf-32"),
    "lines of Unicode": GOOD.replace("\n", "\u2028"),
    "lines of form feeds": GOOD.replace("\n", "\f"),
    "lines of mainframes": GOOD.replace("\n", "\x85"),
    "an ellipsis of Windows": b"# and so on \x85\n" + GOOD.encode(),
    "no-break spaces": GOOD.replace(" ", "\u00a0"),
    "tabs and trailing blanks": GOOD.replace(" ", "\t").replace("\n", "  \n\n"),
    "float ids": "1.0 1 0 0 0 5 -1.0\n2.0 3.0 6 0 0 1 1.0\n3 3 7 1 0 1 2.0\n4 3 6 9 2 0.5 2\n",
    "exponents": GOOD.replace("0.5", "5e-1"),
    "extra columns": GOOD.replace("\n", " 7 0 0.5\n"),
    "comments between and behind": "#a\n" + GOOD.replace("\n", " # soma\n# b\n"),
    "header without #": "id type x y z radius parent\n" + GOOD,
    "reversed": "\n".join(reversed(GOOD.strip().split("\n"))),
    "repeated line": GOOD + "3 3 7 1 0 1 2\n",
    "gaps in the ids": GOOD.replace("3 3 7", "30 3 7"),
    "root 0": GOOD.replace("-1", "0"),
    "root -2": GOOD.replace("-1", "-2"),
    "no newline at the end": GOOD.strip(),
}


REFUSED = {
    "empty": ("", "no node"),
    "comments only": ("# nothing\n", "no node"),
    "cycle": ("1 3 0 0 0 1 -1\n2 3 1 0 0 1 3\n3 3 2 0 0 1 2\n", "line 2: node 2 is its own ancestor"),
    "own parent": ("1 3 0 0 0 1 1\n", "line 1: node 1 is its own parent"),
    "dangling": ("1 3 0 0 0 1 -1\n2 3 1 0 0 1 9\n", "line 2: node 2 has parent 9, which is not in the file"),
    "repeated id": ("1 3 0 0 0 1 -1\n2 3 1 0 0 1 1\n\n2 3 5 0 0 1 1\n", r"line 4: id 2 again .*first in line 2"),
    "NaN": ("1 3 0 0 0 1 -1\n2 3 nan 0 0 1 1\n", "line 2: node 2 has a coordinate that is no number"),
    "infinite": ("1 3 0 inf 0 1 -1\n", "line 1: node 1 has a coordinate"),
    "decimal commas": ("# h\n1 3 0,5 1,5 0 1 -1\n", "line 2: decimal commas in '1 3 0,5 1,5 0 1 -1'"),
    "decimal commas between tabs": ("1\t3\t0,5\t1,5\t0\t1\t-1\n", "line 1: decimal commas"),
    "thousands": ("1 3 1,000.5 0 0 1 -1\n", "line 1: (decimal commas|not seven numbers)"),
    "commas for both": ("1,3,0,0,0,1,-1\n2,3,0,5,1,5,0,1,1\n", "line 2: 9 columns between commas, in other lines 7"),
    "commas for both in all lines": ("1,3,0,5,1,5,0,1,-1\n2,3,0,5,3,5,0,1,1\n", "line 1: 9 columns: commas may be"),
    "empty column": ("1,3,,0,0,1,-1,7\n", "line 1: not seven numbers"),
    "empty column between semicolons": ("1;3;;0;0;1;-1;7\n", "line 1: not seven numbers"),
    "semicolons and commas": ("1;3,10;20;3;2;-1\n", "line 1: 6 columns"),
    "a blank for thousands": ("1 3 0 0 0 1 -1\n2 3 1 000 0 0 1 1\n", "line 2: 8 numbers, in other lines 7"),
    "lost line ends": ("1 3 0 0 0 1 -1 2 3 9 0 0 1 1\n", "line 1: 14 numbers, as of several nodes"),
    "parents in another column": (
        "1 3 0 0 0 1 0 -1\n2 3 9 0 0 1 0 1\n",
        "line 1: 8 columns, and by the seventh no node has a parent",
    ),
    "underscore": ("1 3 1_0 0 0 1 -1\n", "line 1: not seven numbers"),
    "id of 64 bits": (f"{1 << 63} 3 0 0 0 1 -1\n", "line 1: id 9223372036854775808 or parent -1 is no whole number"),
    "other columns": (
        "# id type z y x radius parent\n1 3 0 0 0 1 -1\n",
        "line 1: the header names the columns id",
    ),
    "text": ("1 3 0 0 0 1 -1\n2 3 zero 0 0 1 1\n", "line 2: not seven numbers"),
    "short": ("1 3 0 0 0 1 -1\n2 3 1 0 0\n", "line 2: 5 columns where id type x y z radius parent are wanted"),
    "half an id": ("1.5 3 0 0 0 1 -1\n", "line 1: id 1.5 or parent -1 is no whole number"),
    "NaN id": ("nan 3 0 0 0 1 -1\n", "line 1: id nan"),
}
