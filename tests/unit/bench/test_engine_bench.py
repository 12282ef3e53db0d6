"""What `make bench-engine` is asked for, what it aims at, and how it reads the answers of others."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.bench import events
from tests.bench.aims import aims
from tests.bench.options import arguments
from tests.bench.rounds import Rounds
from tests.bench.weights import requantise
from tests.bench.work import Batch, Stream


def rounds_of(rates: dict[str, dict[int, float]]) -> Rounds:
    found = Rounds()
    for name, by_level in rates.items():
        for level, rate in by_level.items():
            found.add(level, name, Batch([Stream(0.1, 1.0, 1)] * level))
            found.batches[level][name] = [Batch([Stream(0.1, level / rate, 1)] * level)]
    return found


@pytest.mark.parametrize(("precision", "targets"), [("q8", (1.1, 3, 4)), ("q4", (1.2, 2.5, 3))])
def test_blocks_are_measured_beside_llama_cpp(precision: str, targets: tuple[float, ...]) -> None:
    found = rounds_of(
        {
            "platform": {1: 150, 8: 600, 32: 900},
            "llama.cpp loop": {1: 100, 32: 300},
            "llama.cpp server": {8: 200},
            "generate": {1: 1},
        }
    )
    made = {aim.name: aim for aim in aims(found, [], precision)}
    names = [f"platform_vs_llama_cpp_{precision}_{level}" for level in (1, 8, 32)]
    assert sorted(made) == sorted(names)
    assert tuple(made[name].target for name in names) == targets
    assert [made[name].measured.median for name in names] == pytest.approx([1.5, 3, 3])


def test_numbers_are_measured_beside_transformers_and_vllm() -> None:
    found = rounds_of({"platform": {1: 100}, "vllm": {1: 40}, "generate": {1: 50}, "llama.cpp loop": {1: 1}})
    lines = [aim.line() for aim in aims(found, [], "bfloat16")]
    assert lines == ["aim platform_vs_generate_1 2 1 met", "aim platform_vs_vllm_1 2.5 2 met"]


def test_both_edges_are_measured_beside_the_engine_alone() -> None:
    found = rounds_of({"platform": {8: 96}, "platform, gRPC": {8: 94}, "engine alone": {8: 100}})
    assert [aim.line() for aim in aims(found, [], "float32")] == [
        "aim platform_vs_engine_alone_8 0.96 0.95 met",
        "aim platform_grpc_vs_engine_alone_8 0.94 0.95 short",
    ]


def test_the_precision_decides_who_is_measured() -> None:
    blocks = arguments(["--dtype", "q4", "--streams", "1,8"])
    assert blocks.blocks
    assert blocks.levels == (1, 8)
    assert blocks.subjects == {"platform", "grpc", "alone", "llama"}
    numbers = arguments(["--dtype", "float32", "--subjects", "platform"])
    assert not numbers.blocks
    assert numbers.subjects == {"platform", "generate"}
    assert arguments(["--dtype", "float32", "--vllm"]).subjects == {
        *("platform", "grpc", "alone", "generate", "serve", "vllm")
    }
    assert "vllm" not in arguments(["--dtype", "float32"]).subjects
    assert arguments([]).precision in ("float32", "bfloat16")


@pytest.mark.parametrize(
    "given",
    [
        ["--dtype", "q4", "--subjects", "serve"],
        ["--dtype", "float32", "--subjects", "llama"],
        ["--dtype", "q8", "--device", "cuda"],
        ["--dtype", "q8", "--model", "somewhere"],
        ["--dtype", "q8", "--vllm"],
    ],
)
def test_what_makes_no_sense_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(given)
    assert "error: " in capsys.readouterr().err


async def test_events_are_read_across_chunks() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        status = b"200 OK" if head.startswith(b"POST /good ") else b"400 Bad Request"
        writer.write(b"HTTP/1.1 " + status + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b'data: {"a"', b': 1}\n\ndata: {"a": 2}\n', b"\n: ping\n\ndata: [DONE]\n\n"):
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with aclosing(events.post("127.0.0.1", port, "/good", {})) as found:
            assert [event async for event in found] == [{"a": 1}, {"a": 2}]
        with pytest.raises(events.Refused, match=json.dumps("a")):
            async with aclosing(events.post("127.0.0.1", port, "/bad", {})) as found:
                await anext(found)


def test_a_file_is_made_again_in_8_bits(tmp_path: Path) -> None:
    matrix = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(32, 64)
    vector = np.arange(8, dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_tensor(
        "m", gguf.quantize(matrix, gguf.GGMLQuantizationType.Q4_1), raw_dtype=gguf.GGMLQuantizationType.Q4_1
    )
    writer.add_tensor("v", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    requantise(tmp_path / "a.gguf", tmp_path / "b.gguf")
    before, after = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "b.gguf")
    assert after.fields["general.architecture"].contents() == "llama"
    assert after.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert after.fields["llama.block_count"].contents() == 3
    assert after.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    old, new = ({tensor.name: tensor for tensor in reader.tensors} for reader in (before, after))
    assert new["m"].tensor_type.name == "Q8_0"
    numbers = [gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in (old["m"], new["m"])]
    assert np.abs(numbers[0] - numbers[1]).max() < 0.01
    assert new["v"].data.tolist() == vector.tolist()
