"""One peer's loader over the benchmark's samples.

    python load_peer.py PEER DATA SIDE MODE WORKERS WARM SAMPLES KEPT
    python load_peer.py convert DATA

webdataset, Energon and HF datasets read x2i's own tar shards; LitData and Mosaic a copy of the same files in their format,
which `convert` writes. Each shuffles shards as it does by default, and samples by a buffer of `BUFFER` (LitData and Mosaic,
which have an index, as they do by default). All but Energon run in torch's DataLoader.
"""

from __future__ import annotations

import functools
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loading

BUFFER = 100
_JPEG = "output.jpg"


def shards(data: Path) -> list[str]:
    """The tar files."""
    return sorted(str(p) for p in (data / "corpus/shards").glob("*.tar"))


def endless(make: Callable[[], Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    loader = make()
    while True:
        yield from loader


def webdataset(data: Path, workers: int, make: Callable[[Any], Any]) -> Iterator[Any]:
    """Tars, as its documentation has it."""
    import webdataset as wds

    source = wds.WebDataset(shards(data), shardshuffle=100).shuffle(BUFFER).to_tuple("__key__", _JPEG).repeat()
    batched = source.batched(loading.BATCH, collation_fn=make)
    yield from wds.WebLoader(batched, batch_size=None, num_workers=workers)


def energon(data: Path, workers: int, make: Callable[[Any], Any]) -> Iterator[Any]:
    """Tars with its index beside them; crude samples as bytes, made into batches by its task encoder."""
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless

    @stateless
    def cook(sample: Any) -> Any:
        return sample

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]  # noqa: RUF012 - as the base class has it

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            return sample

        @stateless
        def batch(self, samples: list[Any]) -> Any:
            return make([(s["__key__"].rpartition("/")[2], s[_JPEG]) for s in samples])

        @stateless
        def encode_batch(self, batch: Any) -> Any:
            return batch

    dataset = get_train_dataset(
        str(data / "energon"),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=loading.BATCH,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=BUFFER,
        task_encoder=Encoder(),
    )
    yield from get_loader(dataset)


def litdata(data: Path, workers: int, make: Callable[[Any], Any]) -> Iterator[Any]:
    """Its chunks."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(data / "litdata"), shuffle=True)

    def collate(items: list[Any]) -> Any:
        return make([(i["key"], i["data"]) for i in items])

    yield from endless(
        lambda: StreamingDataLoader(dataset, batch_size=loading.BATCH, num_workers=workers, collate_fn=collate)
    )


def mosaic(data: Path, workers: int, make: Callable[[Any], Any]) -> Iterator[Any]:
    """Its shards (MDS)."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(data / "mosaic"), shuffle=True, batch_size=loading.BATCH)

    def collate(items: list[Any]) -> Any:
        return make([(i["key"], i["data"]) for i in items])

    yield from endless(lambda: DataLoader(dataset, loading.BATCH, num_workers=workers, collate_fn=collate))


def hf_datasets(data: Path, workers: int, make: Callable[[Any], Any]) -> Iterator[Any]:
    """Tars by its webdataset builder, streamed."""
    from datasets import Image, load_dataset
    from torch.utils.data import DataLoader

    streamed = load_dataset("webdataset", data_files={"train": shards(data)}, split="train", streaming=True)
    streamed = streamed.cast_column(_JPEG, Image(decode=False)).shuffle(
        seed=0,
        buffer_size=BUFFER,
        max_buffer_input_shards=1,  # more than one, and a single worker gets all shards
    )

    def collate(items: list[Any]) -> Any:
        return make([(i["__key__"], i[_JPEG]["bytes"]) for i in items])

    yield from endless(lambda: DataLoader(streamed, loading.BATCH, num_workers=workers, collate_fn=collate))


def convert(data: Path) -> None:
    """Write the same files in LitData's, Mosaic's and (the index only) Energon's format, beside the corpus."""
    import litdata as lit
    from megatron.energon.cli.main import main as energon_cli
    from streaming import MDSWriter

    names = shards(data)
    with MDSWriter(out=str(data / "mosaic"), columns={"key": "str", "data": "bytes"}) as writer:
        for sample in _samples(names):
            writer.write(sample)
    lit.optimize(_of_shard, names, output_dir=str(data / "litdata"), chunk_bytes="64MB", num_workers=1)
    (data / "energon").mkdir()
    for name in names:
        (data / "energon" / Path(name).name).symlink_to(name)
    flags = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]
    energon_cli(["prepare", *flags, str(data / "energon")], standalone_mode=False)


def _of_shard(name: str) -> Iterator[dict[str, Any]]:
    yield from _samples([name])


def _samples(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        with tarfile.open(name) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix == _JPEG:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield {"key": key, "data": file.read()}


PEERS: dict[str, Callable[..., Iterator[Any]]] = {
    "webdataset": webdataset,
    "energon": energon,
    "litdata": litdata,
    "mosaic": mosaic,
    "hf_datasets": hf_datasets,
}


def main(peer: str, data: str, side: str, mode: str, workers: str, warm: str, samples: str, kept: str) -> None:
    """Time one peer."""
    import torch

    torch.set_num_threads(1)
    make = functools.partial(loading.batch, side=int(side), mode=mode)
    loading.measure(PEERS[peer](Path(data), int(workers), make), int(warm), int(samples), kept)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]))
        print(json.dumps({}))
    else:
        main(*sys.argv[1:])
