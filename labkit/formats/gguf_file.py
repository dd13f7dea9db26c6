"""Writing a GGUF file tensor by tensor, so that no more than one is in memory: whole or not at all.

Number types are named as in llama.cpp. The block types hold 32 numbers of a row with one scale (Q8_0, Q4_0) or a scale
and an offset (Q4_1). Vectors, such as the norms, stay in F32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from labkit.checks import needed
from labkit.files.writing import new_file

NUMBERS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
MAGIC = b"GGUF"


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write.

    Attributes:
        name: in the file.
        shape: as in PyTorch; GGUF lists it backwards.
        numbers: one of `NUMBERS`.
        compute: gives it in fp32.
    """

    name: str
    shape: tuple[int, ...]
    numbers: str
    compute: Callable[[], Tensor]

    def encoded(self) -> np.ndarray:
        """Its bytes, as they are in the file.

        Raises:
            ValueError: NaN, infinity, or what is too large for F16.
        """
        gguf = needed("gguf", "writing a GGUF file")
        weight = self.compute().to(torch.float32)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{self.name} holds NaN or infinity; nothing was saved")
        if self.numbers == "F16" and not torch.isfinite(weight.half()).all():
            raise ValueError(
                f"{self.name} holds numbers too large for F16; choose BF16 or F32. Nothing was saved"
            )
        array = np.ascontiguousarray(weight.cpu().numpy())
        return gguf.quantize(array, gguf.GGMLQuantizationType[self.numbers])


def write_gguf(
    path: Path, architecture: str, values: Mapping[str, object], tensors: Sequence[GGUFTensor]
) -> Path:
    """Write a GGUF file; it replaces one that is at `path`.

    Args:
        path: of the file.
        architecture: "llama".
        values: metadata: text, whole numbers, fractions, switches and lists of these.
        tensors: in the order of the file.

    Returns:
        `path`.

    Raises:
        FileExistsError: what is at `path` is not a GGUF file.
        ValueError: see `GGUFTensor.encoded`.
        labkit.files.CannotWrite: no space, no permission; what was there is intact.
    """
    gguf = needed("gguf", "writing a GGUF file")
    check_replaceable(path)
    with new_file(path) as made:
        writer = gguf.GGUFWriter(made, architecture)
        try:
            for key, value in values.items():
                add_value(writer, key, value)
            for tensor in tensors:
                kind = gguf.GGMLQuantizationType[tensor.numbers]
                block, size = gguf.GGML_QUANT_SIZES[kind]
                nbytes = int(np.prod(tensor.shape)) // block * size
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            for tensor in tensors:
                encoded = tensor.encoded()
                file.write(encoded.tobytes())  # numpy's own tofile hides why a disk refuses
                writer.write_padding(file, encoded.nbytes)
        finally:
            writer.close()
    return path


def add_value(writer, key: str, value: object) -> None:
    """Add a key with the type that its value has in Python."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def check_replaceable(path: Path) -> None:
    """Raise a `FileExistsError` if there is something at `path` that is not a GGUF file."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file, such as {path / 'model.gguf'}")
    if not path.exists():
        return
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise FileExistsError(
                f"{path} is there, and is no GGUF file; it is left as it is. Give another name"
            )
