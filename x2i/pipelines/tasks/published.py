"""`published`: rows that are X2I samples already go through as they are (source kind `x2i_jsonl`)."""

from collections.abc import Iterator

from x2i.corpus.sample import PLACEHOLDER, Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task


class Published(Task):
    """One sample per row whose source gave `task_type` and `instruction`; its task type is kept, typos too."""

    name = "published"

    def task_types(self) -> list[str]:
        return [self.name]

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        task_type, instruction = row.meta.get("task_type"), row.meta.get("instruction")
        if not isinstance(task_type, str) or not isinstance(instruction, str):
            yield Skipped(self.name, "not_x2i")
            return
        numbers = sorted({int(n) for n in PLACEHOLDER.findall(instruction)})
        if numbers != list(range(1, len(row.inputs) + 1)):
            yield Skipped(self.name, "placeholders_do_not_fit")
            return
        yield row.sample(task_type, instruction, row.inputs, {"published": True})
