"""The tables as LaTeX, for booktabs: a table an operator, the best of each problem in bold."""

from __future__ import annotations

from collections.abc import Sequence

from . import style, tables
from .runs import Run, describe

_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def tables_of(runs: Sequence[Run]) -> str:
    r"""One `table` an operator, to be \input into a document that loads booktabs."""
    rows = tables.to_rows(runs)
    places = "; ".join(describe(run.environment) or "environment not recorded" for run in runs)
    shared = f"Every row: {tables.constants(rows)}. {places}. "
    shared += "Time: median, ± half of its 95 % interval (0.5 % at least)."
    if any(row["slowed_by"] for row in rows):
        shared += f" {style.THROTTLED.strip()}: the GPU was held back."
    lines = [r"% \usepackage{booktabs}"]
    for index, block in enumerate(tables.blocks(rows)):
        columns = "".join("r" if numeric else "l" for numeric in block.numeric)
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{escape(block.title)}. {escape(shared)}}}"]
        lines += [rf"\label{{tab:mdnbench-{index + 1}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [_line([escape(text) for text in block.header]), r"\midrule"]
        lines += [_line([_cell(cell) for cell in row]) for row in block.rows]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*lines, ""])


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def _cell(cell: tables.Cell) -> str:
    text = escape(cell.text)
    return rf"\textbf{{{text}}}" if cell.best else text


def _line(texts: Sequence[str]) -> str:
    return f"{' & '.join(texts)} \\\\"
