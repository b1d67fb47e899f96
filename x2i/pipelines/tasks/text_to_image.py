"""`text_to_image`: the caption is the instruction, the picture is the output."""

from collections.abc import Iterator

from pydantic import Field

from x2i.corpus.sample import Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, holds_placeholder


class TextToImageConfig(TaskConfig):
    """Limits on the caption."""

    min_chars: int = Field(3, ge=0, description="shorter captions make no sample")
    max_chars: int = Field(4000, gt=0, description="longer captions make no sample")


class TextToImage(Task):
    """One sample per row that has a text, word for word."""

    name = "text_to_image"
    Config = TextToImageConfig

    def task_types(self) -> list[str]:
        return [self.name]

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        if not row.text:
            yield Skipped(self.name, "no_text")
        elif holds_placeholder(row.text):
            yield Skipped(self.name, "text_has_placeholders")
        elif len(row.text) < self.config.min_chars:
            yield Skipped(self.name, "text_too_short")
        elif len(row.text) > self.config.max_chars:
            yield Skipped(self.name, "text_too_long")
        else:
            yield row.sample(self.name, row.text)
