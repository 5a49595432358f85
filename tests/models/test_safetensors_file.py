"""The safetensors reader: every dtype, and every way in which a file can be damaged or lie."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxserve.models.safetensors_file import DTYPES, SafetensorsFile

FLOATS = {"a": ("F32", [2], [0, 8]), "b": ("F32", [1, 1], [8, 12])}
DATA = bytes(range(12))


def header_of(tensors: dict) -> bytes:
    fields = ("dtype", "shape", "data_offsets")
    return json.dumps({k: dict(zip(fields, v, strict=True)) for k, v in tensors.items()}).encode()


def write(folder, header: bytes, data: bytes = DATA, length: int | None = None):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def read(path) -> dict[str, np.ndarray]:
    with SafetensorsFile(path) as file:
        arrays = {name: np.empty(t.shape, t.dtype) for name, t in file.tensors.items()}
        for name, array in arrays.items():
            file.read_into(name, 0, array)
    return arrays


def free_descriptor() -> int:
    """The lowest one: it moves up when a file is left open."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def assert_refused(path, words: str | None = None) -> None:
    before = free_descriptor()
    with pytest.raises(ValueError, match=words) as raised:
        SafetensorsFile(path)
    assert str(raised.value).startswith(str(path)), "the message names the file"
    assert free_descriptor() == before, "the file is closed"


LIBRARY_DTYPES = [
    *(np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64),
    *(np.float16, np.float32, np.float64, np.complex64, ml_dtypes.bfloat16),
]


@pytest.mark.parametrize("dtype", [np.dtype(dtype) for dtype in LIBRARY_DTYPES], ids=str)
def test_reads_what_the_safetensors_library_writes(tmp_path, dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2 if dtype.kind == "b" else 256, (3, 5 * dtype.itemsize), np.uint8)
    written = {
        "matrix": bits.view(dtype),
        "scalar": np.ones((), dtype),
        "empty": np.ones((0, 4), dtype),
        "vector": np.arange(7).astype(dtype),
    }
    safetensors.numpy.save_file(written, tmp_path / "x.safetensors", metadata={"format": "pt"})
    arrays = read(tmp_path / "x.safetensors")
    assert arrays.keys() == written.keys()
    for name, array in arrays.items():
        assert array.dtype == dtype and array.shape == written[name].shape
        assert array.tobytes() == written[name].tobytes()


@pytest.mark.parametrize(
    "name,dtype,value",
    [
        ("F8_E4M3", ml_dtypes.float8_e4m3fn, -448.0),
        ("F8_E5M2", ml_dtypes.float8_e5m2, -57344.0),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu, 2.0**127),
    ],
)
def test_reads_8_bit_floats(tmp_path, name, dtype, value):
    data = np.array([[1.0, 2.0], [0.5, value]]).astype(dtype)
    path = write(tmp_path, header_of({"x": (name, [2, 2], [0, 4])}), data.tobytes())
    array = read(path)["x"]
    assert array.dtype == dtype
    np.testing.assert_array_equal(array.astype(np.float64), [[1.0, 2.0], [0.5, value]])


def test_every_dtype_is_tested():
    assert len(LIBRARY_DTYPES) + 3 == len(DTYPES)


def test_reads_from_an_offset(tmp_path):
    out = np.empty(3, np.int16)
    path = write(tmp_path, header_of({"x": ("I16", [2, 3], [0, 12])}))
    with SafetensorsFile(path) as file:
        file.read_into("x", 6, out)
    assert out.tobytes() == DATA[6:]


def test_tensors_may_lie_in_any_order(tmp_path):
    header = header_of(
        {"b": ("U8", [4], [8, 12]), "none": ("U8", [0], [8, 8])} | {"a": FLOATS["a"]}
    )
    assert read(write(tmp_path, header))["b"].tolist() == [8, 9, 10, 11]


def test_header_may_be_padded_and_hold_metadata(tmp_path):
    header = header_of(FLOATS).replace(b"{", b'{"__metadata__": {"format": "pt"},', 1) + b"   "
    assert set(read(write(tmp_path, header))) == {"a", "b"}


def test_file_without_tensors(tmp_path):
    assert read(write(tmp_path, b"{}", b"")) == {}


def test_file_truncated_anywhere_is_refused(tmp_path):
    path = write(tmp_path, header_of(FLOATS))
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        assert_refused(path, "too short|header of|tensors end at")


def test_extended_file_is_refused(tmp_path):
    assert_refused(write(tmp_path, header_of(FLOATS), DATA + b"0"), "its tensors end at")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 300, 10**6])
def test_header_longer_than_the_file_is_refused(tmp_path, length):
    path = write(tmp_path, header_of(FLOATS), length=length)
    assert_refused(path, f"header of {length} bytes in a file of {path.stat().st_size}")


def test_header_beyond_the_limit_is_refused_unread(tmp_path):
    path = write(tmp_path, b"{}", b"", length=100_000_001)
    os.truncate(path, 200_000_000)  # sparse
    assert_refused(path, "header of 100000001 bytes")


@pytest.mark.parametrize("length", [0, 1, 40])
def test_header_shorter_than_it_is_is_refused(tmp_path, length):
    assert_refused(write(tmp_path, header_of(FLOATS), length=length), "header is not JSON")


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"\xff\xfe{}", b'{"a": 1,}', b'{"a": ' * 50_000, b"[" * 100_000, b"9" * 5000],
    ids=["empty", "half", "not UTF-8", "comma", "deep objects", "deep lists", "huge number"],
)
def test_header_that_is_not_json_is_refused(tmp_path, header):
    assert_refused(write(tmp_path, header), "header is not JSON")


@pytest.mark.parametrize("header", [b"[]", b"null", b"1", b'"a"'])
def test_header_that_is_no_object_is_refused(tmp_path, header):
    assert_refused(write(tmp_path, header), "header is no JSON object")


@pytest.mark.parametrize("entry", ["null", "[]", "1", '"F32"', "{}", '{"dtype": "F32"}'])
def test_entry_that_describes_no_tensor_is_refused(tmp_path, entry):
    assert_refused(write(tmp_path, b'{"a": %s}' % entry.encode()), "a: entry lacks dtype, shape or")


def test_duplicate_entry_is_refused(tmp_path):
    a, b = header_of({"a": FLOATS["a"]}), header_of({"a": ("F32", [1], [8, 12])})
    assert_refused(write(tmp_path, a[:-1] + b", " + b[1:]))


def test_entry_given_twice_alike_is_refused(tmp_path):
    a = header_of({"a": ("U8", [12], [0, 12])})
    assert_refused(write(tmp_path, a[:-1] + b", " + a[1:]))


@pytest.mark.parametrize("dtype", ["F128", "", None, ["F32"], {}, 32])
def test_unknown_dtype_lists_the_known_ones(tmp_path, dtype):
    path = write(tmp_path, header_of({"a": (dtype, [3], [0, 12])}))
    assert_refused(path, "a: dtype .* is not read; known: BOOL, U8,")


@pytest.mark.parametrize(
    "shape,offsets",
    [
        ([-3], [0, -12]),
        ([-1, -3], [0, 12]),
        ([3.0], [0, 12]),
        ([True, 3], [0, 12]),
        (["3"], [0, 12]),
        (3, [0, 12]),
        ("3", [0, 12]),
        ({"3": 3}, [0, 12]),
        (None, [0, 12]),
        ([2**62], [0, 12]),
        ([3], [0.0, 12]),
        ([3], [False, 12]),
        ([3], ["0", "12"]),
        ([3], [-12, 0]),
    ],
)
def test_sizes_must_be_whole_and_not_negative(tmp_path, shape, offsets):
    path = write(tmp_path, header_of({"a": ("F32", shape, offsets)}))
    assert_refused(path, "a: shape and offsets must be whole numbers")


@pytest.mark.parametrize("offsets", [[], [12], [0, 4, 12], None, 0])
def test_offsets_must_be_two(tmp_path, offsets):
    path = write(tmp_path, header_of({"a": ("F32", [3], offsets)}))
    assert_refused(path, "a: entry lacks dtype, shape or data_offsets")


@pytest.mark.parametrize(
    "shape,offsets", [([3], [0, 8]), ([2], [0, 12]), ([3], [12, 0]), ([2**40, 2**40], [0, 12])]
)
def test_shape_must_fill_the_offsets(tmp_path, shape, offsets):
    path = write(tmp_path, header_of({"a": ("F32", shape, offsets)}))
    assert_refused(path, "a: .* bytes for F32")


@pytest.mark.parametrize(
    "a,b",
    [
        ([0, 8], [4, 8]),
        ([0, 8], [0, 4]),
        ([4, 12], [0, 8]),
        ([0, 8], [12, 16]),
        ([4, 12], [12, 16]),
        ([0, 8], [2**40, 2**40 + 4]),
    ],
    ids=["overlap", "same begin", "overlap 2", "hole", "hole at the start", "out of range"],
)
def test_tensors_fill_the_file_without_holes_or_overlaps(tmp_path, a, b):
    sizes = {name: [(end - begin) // 4] for name, (begin, end) in {"a": a, "b": b}.items()}
    header = header_of({"a": ("F32", sizes["a"], a), "b": ("F32", sizes["b"], b)})
    assert_refused(write(tmp_path, header), "begins at byte .*, expected|its tensors end at")


def test_empty_tensor_inside_another_is_refused(tmp_path):
    header = header_of(FLOATS | {"none": ("F32", [0], [4, 4])})
    assert_refused(write(tmp_path, header), "begins at byte")


@pytest.mark.parametrize("lost", [1, 4, 12, 100])
def test_file_truncated_after_it_was_opened_raises(tmp_path, lost):
    path = write(tmp_path, header_of(FLOATS))
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - lost)
        with pytest.raises(ValueError, match="ends inside b; was it rewritten"):
            file.read_into("b", 0, np.empty(1, np.float32))


def test_damaged_header_never_gets_past_the_checks(tmp_path):
    header = bytearray(header_of(FLOATS))
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(1000):
        damaged = header.copy()
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        try:
            arrays = read(write(tmp_path, bytes(damaged)))
        except ValueError:
            num_refused += 1
        else:
            assert sum(array.nbytes for array in arrays.values()) == len(DATA)
    assert 500 < num_refused < 1000, "both happen"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_folder_is_not_left_open(tmp_path):
    before = free_descriptor()
    with pytest.raises((OSError, ValueError)):
        SafetensorsFile(tmp_path)
    assert free_descriptor() == before


def test_close_closes(tmp_path):
    before = free_descriptor()
    SafetensorsFile(write(tmp_path, header_of(FLOATS))).close()
    assert free_descriptor() == before
