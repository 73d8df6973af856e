"""Saving of policies in Hugging Face format, whole or tensor by tensor."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdpo.errors import DataError, one_line
from fastdpo.model.pieces import Trace, gathered, is_sharded
from fastdpo.storage import atomic_directory

# What belongs to a model beside its weights and its tokenizer.json: processors of images, sound and
# video, and the vocabularies that other programs read.
_BESIDE = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "chat_template.json", "tokenizer.model", "vocab.json",
    "merges.txt", "tekken.json",
)  # fmt: skip
# What makes the tensors of some names.
Making = Mapping[str, Callable[[], Tensor]]
_log = logging.getLogger(__name__)


def save_policy(model: Any, tokenizer: Any, path: Path, *, start: str | None = None) -> None:
    """Write model and tokenizer in Hugging Face format (safetensors), whole or not at all.

    A model that is sharded over processes (`fastdpo.model.shard`) is gathered tensor by tensor, and
    written by the first of them; all of them call this.

    Args:
        start: folder or hub name of the model that this one was; what else it has, as processors of
            images, is kept beside the weights.
    """
    values: Making = {
        name: partial(gathered, x) for name, x in model.state_dict().items() if is_sharded(x)
    }
    save_made(model, values, tokenizer, path, start=start, collective=bool(values))


def save_made(
    model: Any,
    values: Making,
    tokenizer: Any,
    path: Path,
    *,
    start: str | None = None,
    collective: bool = False,
) -> None:
    """`save_policy` of tensors that are made when it is their turn to be written.

    Args:
        values: what makes the tensors of some names of the model's ``state_dict``.
        collective: whether all processes have to make them, and call this.
    """
    with ExitStack() as stack:
        folder, failed = None, None
        if not collective or torch.distributed.get_rank() == 0:
            try:
                folder = stack.enter_context(atomic_directory(path))
            except OSError as error:
                failed = error
        _agree(failed, collective)
        if values:
            save_in_pieces(model, folder, values, collective=collective)
        elif folder is not None:
            model.save_pretrained(folder)
        if folder is not None:
            tokenizer.save_pretrained(folder)
            if start:
                _keep_beside(start, folder)


def _agree(failed: Exception | None, collective: bool) -> None:
    """Raise what failed, on one process or on any of all: none begins to make tensors then."""
    found: list[Any] = [failed and str(failed)]
    if collective:
        found *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, found[0])
    if failed is not None:
        raise failed
    for text in found:
        if text is not None:
            raise DataError(text)


def _keep_beside(start: str, folder: Path) -> None:
    """Copy what neither model nor tokenizer writes from where the model came from."""
    from transformers.utils.hub import cached_files

    wanted = [name for name in _BESIDE if not (folder / name).exists()]
    try:
        found = cached_files(start, wanted, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        _log.warning(
            "of model=%s only weights, configuration and tokenizer are kept; copy %s "
            "beside the policy where it has them: %s",
            start, ", ".join(_BESIDE), one_line(error),
        )  # fmt: skip
        return
    for path in found or ():
        shutil.copyfile(path, folder / Path(path).name)


def save_in_pieces(
    model: Any, folder: Path | None, values: Making, *, collective: bool = False
) -> None:
    """``model.save_pretrained(folder)`` of tensors that are made one by one, file by file.

    Args:
        model: what its class does to names and tensors is done to those of its ``state_dict``.
        folder: None where this process only takes part in making them.
        collective: whether all processes have to make them, and call this; one whose disk is full
            makes the rest too, so that the others don't wait for it.

    Raises:
        OSError, safetensors.SafetensorError: a file could not be written.
    """
    from huggingface_hub.serialization import _torch
    from transformers import modeling_utils

    hf: Any = modeling_utils
    trace, write, files = Trace(), hf.safe_save_file, []
    state = {
        name: trace.source(x.shape, x.dtype, partial(_made, values[name])) if name in values else x
        for name, x in model.state_dict().items()
    }
    failed: list[Exception] = []
    with (
        mock.patch.object(modeling_utils, "safe_save_file", lambda *x, **y: files.append((x, y))),
        mock.patch.object(model, "should_save_on_this_rank", lambda *_: True, create=True),
        # Parts of one tensor go to one file, which the hub's code can't tell without content.
        mock.patch.object(_torch, "get_torch_storage_id", _storage),
        ExitStack() as stack,
    ):
        try:
            # All but tensors is written here, on the other processes for nothing.
            out = folder or stack.enter_context(tempfile.TemporaryDirectory())
            with trace:
                model.save_pretrained(out, state_dict=state)
        except Exception as error:
            failed.append(error)
    _agree(next(iter(failed), None), collective)
    made = (x for (tensors, _), _ in files for x in tensors.values() if trace.knows(x))
    if not all(map(trace.can_make, made)):
        _save_whole(model, folder, values)
        return
    trace.hollow = folder is None
    for (tensors, path), options in files:
        real = {}
        for name, tensor in tensors.items():
            tensor = trace.value(tensor) if trace.knows(tensor) else tensor
            if folder is not None and not failed:
                # A copy: the whole that it is a part of is let go of.
                real[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        if folder is not None and not failed:
            try:
                write(real, folder / Path(path).name, **options)
            except Exception as error:
                failed.append(error)
    if failed:
        raise failed[0]


def _save_whole(model: Any, folder: Path | None, values: Making) -> None:
    """Where transformers' conversion cannot be done again in pieces: one process has them all."""
    state, tied = model.state_dict(), dict[int, Tensor]()
    owners = dict(model.named_parameters(remove_duplicate=False))
    for name, make in values.items():
        tensor, owner = make(), id(owners.get(name, name))
        if folder is not None and owner not in tied:
            tied[owner] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        if folder is not None:
            state[name] = tied[owner]
    if folder is not None:
        model.save_pretrained(folder, state_dict=state)


def _made(make: Callable[[], Tensor], rows: slice | None) -> Tensor:
    made = make().cpu()  # several are kept, and a device has no room for them
    return made if rows is None else made[rows]


def _storage(tensor: Tensor) -> tuple[str, int, int]:
    storage = tensor.untyped_storage()
    return str(tensor.device), storage._cdata, storage.nbytes()
