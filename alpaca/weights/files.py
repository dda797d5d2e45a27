"""Checkpoint directories, read a piece of a tensor at a time, with nothing in them trusted.

`model.safetensors`, its shards, and the older `pytorch_model*.bin`. Tensors are handed out as arrays of unsigned words
(uint16 for bfloat16), so that every bit survives. Torch is imported for `.bin` only.
"""

import hashlib
import json
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alpaca.common import ExitCode, ExpectedError, atomic_write

# https://huggingface.co/docs/safetensors: names of the types and bytes an element. 4- and 6-bit types are not read.
DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
MAX_HEADER_BYTES = 16 * 2**20  # 70B models have headers of 0.1 MB; parsing 100 MB of JSON would take gigabytes
MAX_JSON_BYTES = 64 * 2**20  # an index of 100,000 tensors has 10 MB
MAX_RANK = 64  # numpy's and torch's limit; the product of 400,000 dimensions takes seconds, and longer for each more
MAX_NAME = 1000  # characters of a tensor's name
# What the tokenizers and processors of transformers 5 load, and mistral-common's tekken.json. No code.
CARRIED_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|tekken)\.json"
    r"|((video_)?preprocessor|processor|audio_tokenizer)_config\.json|chat_template\.jinja"
    r"|(vocab|vocab-src|vocab-tgt|target_vocab|entity_vocab|emoji|byte_maps|normalizer|speaker_embeddings_path)\.json"
    r"|word_(shape|pronunciation)\.json|(vocab|merges|dict)\.txt|bpe\.codes|prophetnet\.tokenizer|(source|target)\.spm"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe|spm|spm_char|tiktoken)\.model|[\w-]+\.tiktoken"
)
WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
BLOCK_BYTES = 4 * 2**20
LFS_POINTER = b"version https://git-lfs"
TORCH_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


def bad_data(message: str) -> ExpectedError:
    return ExpectedError(message, ExitCode.DATA)


def mismatch(message: str) -> ExpectedError:
    return ExpectedError(message, ExitCode.INTEGRITY)


def first_three(items: list[str]) -> str:
    """["a", "b", "c", "d", "e"] → "a; b; c; and 2 more": a wrong base is hundreds of tensors, and one line."""
    more = f"; and {len(items) - 3} more" if len(items) > 3 else ""
    return "; ".join(items[:3]) + more


class Tensor(NamedTuple):
    """Where a tensor lies: its bytes are [offset, offset + elements * word) of `file`."""

    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


def word_type(dtype: str) -> np.dtype:
    """ "BF16" → uint16."""
    return np.dtype(f"<u{DTYPE_BYTES[dtype]}")


# ---------------------------------------------------------------------------------------------------------------------
# Files and JSON that may be damaged or hostile


def file_inside(directory: Path, name: Any) -> Path:
    """The regular file `name` of a directory; refuses names and links that lead out of it.

    The Hub client's cache is the one exception: its snapshots are links into the `blobs` folder beside them.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise bad_data(f"{directory}: {name!r} is not the name of a file in this directory; get a clean copy")
    path = (directory / name).resolve()
    allowed = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        allowed.append(directory.resolve().parent.parent / "blobs")
    if path.parent not in allowed:
        raise bad_data(f"{directory / name}: is a link to {path}, outside the directory; put the file itself there")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise bad_data(f"{directory / name}: missing; get a complete copy")
    if not stat.S_ISREG(mode) or not os.access(path, os.R_OK):
        raise bad_data(f"{directory / name}: not a regular file that can be read")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            problem = "a Git LFS pointer instead of the file; run `git lfs install` and `git lfs pull` there"
            raise bad_data(f"{directory / name}: {problem}")
    return path


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without repeated keys, or an error that names `where`."""

    def no_duplicates(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} twice")
            found[key] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, integers of 5,000 digits
        raise bad_data(f"{where}: not valid JSON ({str(error) or 'nested too deeply'}); get a clean copy")
    if not isinstance(value, dict):
        raise bad_data(f"{where}: JSON object expected; get a clean copy")
    return value


def read_json(directory: Path, name: str) -> dict[str, Any]:
    path = file_inside(directory, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise bad_data(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON; get a clean copy")
    return parse_json(path.read_bytes(), str(path))


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # Python 3.10 has no hashlib.file_digest
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_header(path: Path) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of a safetensors file, and the bytes before its data. Anything but a sound file raises.

    Sound: the data ends where the file ends, every byte of it belongs to one tensor, and sizes agree with shapes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            problem = f"a header of {length} bytes in a file of {size}: truncated or damaged"
            raise bad_data(f"{path}: {problem}; fetch it again")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise bad_data(f"{path}: damaged header; fetch it again")
    header = parse_json(text.rstrip(b" "), f"header of {path}")
    metadata = header.pop("__metadata__", {"format": "pt"})
    # The same rule as transformers: metadata, when present, says which framework's layout this is.
    if not isinstance(metadata, dict) or metadata.get("format") not in ("pt", "tf", "flax", "mlx", "np"):
        raise bad_data(f"{path}: damaged or foreign metadata in the header; fetch it again")

    tensors = {}
    for name, entry in header.items():
        where = f"tensor {(name if name.isprintable() else repr(name))[:MAX_NAME]} in {path}"
        named = name.isprintable() and len(name) <= MAX_NAME
        if not named or not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise bad_data(f"{where}: damaged header entry; fetch it again")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise bad_data(f"{where}: unknown type {str(dtype)[:MAX_NAME]!r}")
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= MAX_RANK
        if not lists or any(type(n) is not int or not 0 <= n < 2**63 for n in shape + offsets):
            raise bad_data(f"{where}: damaged shape or offsets; fetch it again")
        begin, end = offsets
        tensors[name] = tensor = Tensor(dtype, tuple(shape), path, 8 + length + begin)
        if end - begin != tensor.bytes:
            raise bad_data(f"{where}: {end - begin} bytes for {dtype} {shape}; fetch it again")
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != position:
            raise bad_data(f"tensor {name} in {path}: overlaps another or leaves a hole; fetch it again")
        position += tensor.bytes
    if position != size:
        raise bad_data(f"{path}: {size} bytes, its header says {position}: truncated or damaged; fetch it again")
    return tensors, start + text


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Checkpoint:
    """The tensors of a directory: `tensors` by name, `config` as a dict, `read` for any stretch of elements.

    Raises ExpectedError (bad data) when files are missing, damaged, or lead out of the directory.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        refuse_original_llama(directory)
        self.config = read_json(directory, "config.json")
        self.tensors: dict[str, Tensor] = {}
        self.weight_files: set[str] = set()  # names, that of the index among them
        self.headers: dict[str, bytes] = {}  # of safetensors files, by file name
        self._handles: dict[Path, int] = {}
        self._loaded: dict[str, Any] = {}  # tensors of .bin files: flat torch tensors over mapped files
        try:
            self._open_files()
        except BaseException:
            self.close()
            raise

    def _open_files(self) -> None:
        for file, names in self._weight_files().items():
            path = file_inside(self.directory, file)
            self.weight_files.add(file)
            if file.endswith(".safetensors"):
                found, self.headers[file] = read_header(path)
                self._handles[path] = os.open(path, os.O_RDONLY)
            else:
                found = self._load_bin(path)
            for name in found.keys() & self.tensors.keys():
                raise bad_data(f"tensor {name}: both in {path} and in {self.tensors[name].file}; get a clean copy")
            if names is not None and names != found.keys():
                wrong = first_three(sorted(names ^ found.keys()))
                raise bad_data(f"{path}: the index and the shard disagree about {wrong!r}; get a complete copy")
            self.tensors.update(found)
        if not self.tensors:
            raise bad_data(f"{self.directory}: no tensors; get a complete copy")

    def _weight_files(self) -> dict[str, set[str] | None]:
        """File name → names of its tensors by the index (None: a single file)."""
        for kind, single in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
            index = f"{single}.index.json"
            present = [name for name in (single, index) if os.path.lexists(self.directory / name)]
            if len(present) == 2:
                raise bad_data(f"{self.directory}: holds both {single} and {index}; remove the one that is not meant")
            if present == [single]:
                return {single: None}
            if present == [index]:
                self.weight_files.add(index)
                weight_map = read_json(self.directory, index).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise bad_data(f"{self.directory / index}: no weight_map; get a clean copy")
                files: dict[str, set[str] | None] = {}
                for name, file in weight_map.items():
                    if not isinstance(file, str) or file not in files:
                        path = file_inside(self.directory, file)
                        if not file.endswith(f".{kind}"):
                            raise bad_data(f"{self.directory / index}: {path.name} for {name} is no .{kind} file")
                    files.setdefault(file, set()).add(name)
                return files
        hint = "give the directory that has model.safetensors or pytorch_model.bin, or their index"
        if (self.directory / "adapter_config.json").exists():
            hint = "merge the adapter into its base first"
        raise bad_data(f"{self.directory}: no weights here; {hint}")

    def _load_bin(self, path: Path) -> dict[str, Tensor]:
        """A torch file, mapped and unpickled with `weights_only`: it can hold tensors and no code."""
        import torch

        dtypes = {
            **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
            **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
            **{torch.bool: "BOOL"},
        }
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                start = file.read(len(TORCH_BEFORE_1_6))
            if start != TORCH_BEFORE_1_6:
                raise bad_data(f"{path}: truncated or damaged; fetch it again")
            resave = f"import torch; f = {str(path)!r}; torch.save(torch.load(f, weights_only=True), f)"
            problem = "written by torch before 1.6 in a form that cannot be mapped; save it again, in a copy"
            raise bad_data(f'{path}: {problem}: python -c "{resave}"')
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler raises whatever it meets in a damaged file
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise bad_data(f"{path}: damaged, or holds more than tensors ({reason[0][:200]}); fetch it again")
        if not isinstance(state, dict):
            raise bad_data(f"{path}: a dict of tensors expected, {type(state).__name__} found")
        found = {}
        for name, tensor in state.items():
            named = isinstance(name, str) and name.isprintable()
            if not named or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise bad_data(f"{path}: {name!r} is not a tensor by name; save the model's state_dict")
            if tensor.dtype not in dtypes:
                raise bad_data(f"tensor {name} in {path}: unknown type {tensor.dtype}")
            found[name] = Tensor(dtypes[tensor.dtype], tuple(tensor.shape), path, 0)
            if found[name].bytes > path.stat().st_size:  # a view with stride 0 can claim any shape
                raise bad_data(f"tensor {name} in {path}: larger than the file; fetch it again")
            self._loaded[name] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        return found

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor as unsigned words; may be called from many threads."""
        tensor = self.tensors[name]
        word = DTYPE_BYTES[tensor.dtype]
        if name in self._loaded:
            return self._loaded[name][start * word : stop * word].numpy().view(word_type(tensor.dtype))
        words = np.empty(stop - start, word_type(tensor.dtype))
        handle, offset, done = self._handles[tensor.file], tensor.offset + start * word, 0
        buffer = memoryview(words).cast("B")
        while done < len(buffer):
            count = os.preadv(handle, [buffer[done:]], offset + done)
            if count == 0:
                raise bad_data(f"tensor {name} in {tensor.file}: the file became shorter while it was read")
            done += count
        return words

    @property
    def archives(self) -> list[Path]:
        """The `.bin` files."""
        return sorted({self.tensors[name].file for name in self._loaded})

    def close(self) -> None:
        self._loaded.clear()
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def check_archive(path: Path, advance: Callable[[int], None]) -> None:
    """Compare the CRC-32 that torch wrote with every record of a `.bin` file; `advance` hears of the bytes read."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                with archive.open(record) as file:  # raises at the end of a record whose sum differs
                    while block := file.read(BLOCK_BYTES):
                        advance(len(block))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise bad_data(f"{path}: damaged ({error}); fetch it again")


def refuse_original_llama(directory: Path) -> None:
    """Raises for the files that Meta and Mistral hand out, which have other names and no config.json."""
    parts = len(list(directory.glob("consolidated.*.pth")))
    if (directory / "config.json").exists() or not (parts or (directory / "params.json").exists()):
        return
    if (directory / "consolidated.safetensors").exists():
        problem = (
            "Mistral's own files; fetch config.json, model*.safetensors and their index, which lie beside them there"
        )
        raise bad_data(f"{directory}: {problem}")
    command = "python -m transformers.models.llama.convert_llama_weights_to_hf"
    flags = f"--input_dir {directory} --num_shards {parts or 1} --output_dir <directory to write>"
    problem = (
        "Meta's own files (consolidated.*.pth, params.json), not the Hugging Face format; convert them first, with"
    )
    place = "in an environment of its own: pip install torch sentencepiece transformers==4.46.3 accelerate"
    later = "(of a later LLaMA with --llama_version 2, 3, 3.1 or 3.2)"
    raise bad_data(f"{directory}: {problem} tokenizer.model beside them and {place} && {command} {flags} {later}")


def carried_files(directory: Path) -> list[Path]:
    """Config, generation config, and what a tokenizer or processor loads; never code."""
    return [file_inside(directory, name) for name in sorted(os.listdir(directory)) if CARRIED_FILES.fullmatch(name)]


def files_left_behind(checkpoint: Checkpoint) -> list[str]:
    """Names of what lies in the directory and is neither carried over nor one of its weights; a folder ends in /."""
    known = checkpoint.weight_files | {"weight_diff.json"}
    names = [name for name in sorted(os.listdir(checkpoint.directory)) if not CARRIED_FILES.fullmatch(name)]
    left = [name for name in names if name not in known]
    return [f"{name}/" if (checkpoint.directory / name).is_dir() else name for name in left]


def changed_line_ends(path: Path, sha256: str) -> bool:
    """Has the file the contents with this sum, but for line ends: \\r\\n where there was \\n, or the other way?"""
    if path.stat().st_size > MAX_JSON_BYTES:
        return False
    unix = path.read_bytes().replace(b"\r\n", b"\n")
    return sha256 in [hashlib.sha256(text).hexdigest() for text in (unix, unix.replace(b"\n", b"\r\n"))]


def copy_file(path: Path, directory: Path) -> None:
    with atomic_write(directory / path.name, "wb") as file:
        file.write(path.read_bytes())


def local_directory(path: Any, flag: str) -> Path:
    """A directory as it is; a Hub id through the Hub client, which knows its cache, token and HF_HUB_OFFLINE."""
    path = str(path)
    if os.path.isdir(path):
        return Path(path).resolve()
    if os.path.lexists(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise ExpectedError(f"--{flag} {path}: no such directory", ExitCode.USAGE)
    from huggingface_hub import errors, snapshot_download

    small = ["*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.codes", "*.tiktoken", "*.tokenizer"]
    try:
        directory = Path(snapshot_download(path, allow_patterns=[*small, "model*.safetensors"]))
        if not any(directory.glob("model*.safetensors")):
            directory = Path(snapshot_download(path, allow_patterns=[*small, "pytorch_model*.bin"]))
        return directory.resolve()
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        problem = "and the Hub refuses the id; check it, accept the model's terms, log in with `hf auth login`"
        raise ExpectedError(f"--{flag} {path}: no such directory, {problem}", ExitCode.API)
    except (errors.HFValidationError, errors.OfflineModeIsEnabled, OSError, RuntimeError):
        problem = f"and the Hub cannot be reached; give a directory, or run `hf download {path}` where it can"
        raise ExpectedError(f"--{flag} {path}: no such directory, {problem}", ExitCode.USAGE)
