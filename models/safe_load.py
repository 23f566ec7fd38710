"""Opening checkpoint files without running any of their code, and the error that says why one cannot be opened."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from config import ProgramError


class CheckpointError(ProgramError, RuntimeError):
    """A file of weights is missing, damaged, unsafe or does not fit; one sentence."""

    exit_status = 3
    any_rank = True


# --------------------------------------------------------------------------------------------------
# The safe reader
# --------------------------------------------------------------------------------------------------

class _Inert:
    """Stands for a pickled object beside the weights (a Namespace, a path, a numpy number): made and filled, never used."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# torch's weights-only reader looks a class up by its name in the file and takes these instead. It fills no other mappings
# than plain ones, so a CfgNode becomes an OrderedDict.
_STAND_INS = [
    (OrderedDict, "yacs.config.CfgNode"), (OrderedDict, "easydict.EasyDict"), (_Inert, "argparse.Namespace"),
    *((_Inert, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "Path")),
    *((_Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    (_Inert, "numpy.dtype"), (_Inert, "numpy.ndarray"),
    *((_Inert, f"numpy.dtypes.{kind}DType") for kind in ("Float64", "Float32", "Int64")),
]

# A checkpoint of this program ends in MAGIC + sha256 of everything before it (see utils/checkpoint.py).
TRAILER_MAGIC = b"HVTSHA1\n"
TRAILER_SIZE = len(TRAILER_MAGIC) + hashlib.sha256().digest_size


def verify_digest(path: str) -> bool:
    """True when the file carries this program's digest and it matches; False when it carries none.

    Raises:
        CheckpointError: the digest does not match the content: the file is damaged.
    """
    size = os.path.getsize(path)
    if size < TRAILER_SIZE:
        return False
    with open(path, "rb") as file:
        file.seek(size - TRAILER_SIZE)
        trailer = file.read()
        if not trailer.startswith(TRAILER_MAGIC):
            return False
        file.seek(0)
        digest, left = hashlib.sha256(), size - TRAILER_SIZE
        while left:
            chunk = file.read(min(left, 1 << 22))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
    if digest.digest() != trailer[len(TRAILER_MAGIC):]:
        raise CheckpointError(f"{path}: damaged (its checksum does not match its content); use another checkpoint")
    return True


def _check_archive(path: str) -> None:
    """Refuse a zip that is no file of ``torch.save``, and one whose members claim more bytes than the file has: torch would allocate
    them before it looks. It stores its members as they are, so none is larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size, names = os.path.getsize(path), [name.partition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in names and any(name.startswith("code/") for name in names):
            raise CheckpointError(f"{path}: is a TorchScript program; take the weights out of it: python -c \"import torch; "
                                  f"torch.save(torch.jit.load({path!r}, 'cpu').state_dict(), 'weights.pth')\"")
        if "archive_format" in names:
            raise CheckpointError(f"{path}: is a program of torch.export; give the checkpoint that it was made from")
        if any(member.compress_type for member in archive.infolist()):
            raise CheckpointError(f"{path}: refused, its members are compressed, as torch.save never does it, and claim to be larger than "
                                  "the file; unpack it if it is a packed checkpoint")
        if sum(member.file_size for member in archive.infolist()) > size:
            raise CheckpointError(f"{path}: refused, its members claim to be larger than the file")


MOST_REPEATED = 1 << 28  # bytes that the tensors of a file may be longer than what is stored of them


def _check_sizes(content: Any, path: str) -> None:
    """Refuse tensors without data, and those that repeat a few stored numbers to a size that no file has.

    Strides of 0 make a thousand million million numbers out of one, and whoever looks at all of them never ends.
    """
    repeated, waiting, seen = 0, [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.is_meta:
                raise CheckpointError(f"{path}: holds shapes without numbers (tensors of the meta device); save the weights themselves")
            if value.layout == torch.strided:
                repeated += max(0, value.numel() * value.element_size() - value.untyped_storage().nbytes())
                if repeated > MOST_REPEATED:
                    raise CheckpointError(f"{path}: refused, a tensor of shape {list(value.shape)[:6]} in it repeats "
                                          f"{value.untyped_storage().nbytes()} stored bytes; save it with .contiguous()")
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


def weights_file(path: str) -> str:
    """The file of weights in the folder ``path`` where a config.json describes just one, as hubs have it; else ``path``."""
    path = os.fspath(path)
    if not os.path.isfile(os.path.join(path, "config.json")):
        return path
    there = sorted(os.listdir(path))
    found = [name for name in there if name.endswith(".safetensors")] or [name for name in there if name == "pytorch_model.bin"]
    return os.path.join(path, found[0]) if len(found) == 1 else path


def read_file(path: str) -> Any:
    """The content of a ``.pth`` or ``.safetensors`` file, or of the one in a folder as hubs have them, as plain data, tensors on the CPU.

    Raises:
        CheckpointError: missing, empty, damaged, or holding anything but plain data and tensors.
    """
    path = weights_file(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: is a folder; name a checkpoint file in it")
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such checkpoint file")
    if os.path.getsize(path) == 0:
        raise CheckpointError(f"{path}: is empty; the copy or the save was cut off")
    try:
        signed = verify_digest(path)
        _check_archive(path)
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path, device="cpu")  # which checks every shape against its bytes
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle protocol of a file that is refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, Mapping) and FORMAT_KEY in content and not signed:
            raise CheckpointError(f"{path}: damaged (its checksum is missing); use another checkpoint")
        _check_sizes(content, path)
        return content
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        found = _refused_class(str(error))
        if found:
            raise CheckpointError(f"{path}: refused, it holds a pickled {found}, which could run code; "
                                  "ask its author for plain weights (a state dict, or safetensors)") from None
        raise CheckpointError(f"{path}: damaged or not a checkpoint") from None
    except PermissionError:
        raise CheckpointError(f"{path}: cannot be read (permission denied)") from None
    except Exception as error:  # torch, zip and safetensors raise many kinds for a damaged file
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        reason = f" ({reason})" if any(c.isalpha() for c in reason) else ""  # some raise the bare byte they stumbled over
        raise CheckpointError(f"{path}: damaged or not a checkpoint{reason}") from None


def _refused_class(message: str) -> str:
    """The class or function that torch's reader would not touch; nothing when the bytes are simply no pickle."""
    found = re.search(r"(?:GLOBAL|class|function|global:?)\s+<?(?:built-in function )?([A-Za-z_][\w.]*\.\w+|\w+(?=>))", message)
    return found[1] if found and "Unsupported operand" not in message else ""


FORMAT_KEY = "hvt_format"
