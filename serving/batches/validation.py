"""Whether a batch can run: the file's own problems, and whether it fits the batch and this deployment."""

from __future__ import annotations

from penstock.serving.batches.inspection import Inspection
from penstock.serving.batches.lines import Problem


def problems_of(found: Inspection, *, endpoint: str, model: str, max_lines: int) -> list[Problem]:
    """What keeps the batch from running; empty when it can. ``model`` is the one that is served."""
    if not found.lines:
        return [Problem("empty_file", "The input file is empty.", param="input_file_id")]
    problems = []
    if found.lines > max_lines:
        text = f"The input file has {found.lines} requests; a batch may have {max_lines}."
        problems.append(Problem("too_many_tasks", text, param="input_file_id"))
    if found.url is not None and found.url != endpoint:
        text = f"The url {found.url[:100]!r} is not the batch's endpoint, {endpoint!r}."
        problems.append(Problem("url_mismatch", text, found.first_line, "url"))
    if found.model is not None and found.model != model:
        text = f"The model {found.model[:100]!r} is not served here; {model!r} is."
        problems.append(Problem("model_not_found", text, found.first_line, "body.model"))
    problems += found.problems
    return problems
