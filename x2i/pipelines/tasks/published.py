"""`published`: rows that are samples already go through as they are (source kinds `x2i_jsonl`, `magicbrush` …)."""

from collections.abc import Iterator
from typing import Any

from x2i.corpus.sample import PLACEHOLDER, Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task


class Published(Task):
    """One sample per row whose source gave `task_type` and `instruction`; its task type is kept, typos too.

    Rows whose source gave `messages` (ms-swift's format, an `<image>` for each picture) become understanding samples,
    of the task type that the source gave, or `understanding`; with its `objects` and its `rejected_response`.
    """

    name = "published"

    def task_types(self) -> list[str]:
        return [self.name]

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        task_type, instruction = row.meta.get("task_type"), row.meta.get("instruction")
        messages = row.meta.get("messages")
        if isinstance(messages, list) and messages:
            yield from self._talk(row, messages)
            return
        if not isinstance(task_type, str) or not isinstance(instruction, str):
            yield Skipped(self.name, "not_x2i")
            return
        numbers = sorted({int(n) for n in PLACEHOLDER.findall(instruction)})
        if numbers != list(range(1, len(row.inputs) + 1)):
            yield Skipped(self.name, "placeholders_do_not_fit")
            return
        yield row.sample(task_type, instruction, row.inputs, {"published": True}, mask=row.mask)

    def _talk(self, row: Selected, messages: list[Any]) -> Iterator[Sample | Skipped]:
        sound = all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
        objects, rejected = row.meta.get("objects") or None, row.meta.get("rejected_response")
        sound = sound and isinstance(objects, dict | None)
        if rejected is not None:  # worse than an answer that must be there
            sound = sound and isinstance(rejected, str) and messages[-1]["role"] == "assistant"
        if not sound:
            yield Skipped(self.name, "bad_messages")
            return
        images = [*row.inputs, row.picture]
        places = sum(str(m["content"]).count("<image>") for m in messages)
        if places != len(images):
            yield Skipped(self.name, "placeholders_do_not_fit")
            return
        task_type = row.meta.get("task_type")
        task_type = task_type if isinstance(task_type, str) and task_type else "understanding"
        yield row.conversation(
            task_type, messages, {"published": True}, images=images, objects=objects, rejected_response=rejected
        )
