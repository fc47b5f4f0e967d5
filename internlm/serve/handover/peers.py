"""Other inference engines, as data: what each does with an export of ours, and how we know.

    SUPPORT["stop strings"]["lmdeploy"]     # "one token each; longer ones are dropped [source 0.18.0]"

A claim is only as good as how it was made, and that stands beside it: read in the source of a version, ran with it, or
documented. What nobody looked at has no row. docs/serving.md holds the table as `internlm deploy --table` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program that serves models."""

    title: str
    version: str
    program: str
    install: str
    key_variable: str | None = None
    """Environment variable that it takes a key from; None: from its command line only, which others can read."""
    bare_chat: str = "is an error"
    """What /v1/chat/completions does without a chat format."""
    template_names: Mapping[str, str] = field(default_factory=dict)
    """Regular expression on the lower-case path of a model → the built-in chat format that it selects."""
    tool_parsers: Mapping[str, str] = field(default_factory=dict)
    """Our tool format → `--tool-call-parser` that reads its calls. llama.cpp tells by the chat format."""
    refusal: str = ""
    """Why it does not take an InternLMForCausalLM."""
    unbiased: tuple[str, ...] = ()
    """Classes in which it has no bias on wo, whatever `attention_bias` says."""
    untied: tuple[str, ...] = ()
    """Classes in which it reads `lm_head` and does not tie it to the embedding."""


PEERS: dict[str, Peer] = {
    "lmdeploy": Peer(
        title="LMDeploy",
        version="0.18.0",
        program="lmdeploy",
        install="pip install lmdeploy",
        bare_chat="runs the messages together without a word",
        tool_parsers={"hermes": "qwen3", "internlm2": "internlm"},
        refusal="LMDeploy removed InternLM of 2023 in 0.15 (in 0.14 only its PyTorch engine still has it)",
        untied=("MixtralForCausalLM",),
        template_names={
            "llama-?2": "llama2",
            "codellama": "codellama",
            "^(?!.*llava).*vicuna": "vicuna",
            "wizardlm": "wizardlm",
            r"^(?!.*(mistral|v1\.6-34b))(?=.*llava)(?=.*v1)|llava-1\.5": "llava-v1",
            r"llava-v1\.6-34b": "llava-chatml",
            "chatglm2": "chatglm",
            "cogvlm(?!2)": "cogvlm",
            "^(?=.*mistral).*(instruct|llava)": "mistral",
            "^(?=.*mixtral).*(instruct|llava)": "mixtral",
            "^(?=.*v1-1).*internvl-chat": "internvl-zh",
            "^(?!.*vl2)(?=.*chat).*deepseek-vl": "deepseek-vl",
            "deepseek-vl2": "deepseek-vl2",
        },
    ),
    "vllm": Peer(
        title="vLLM", version="0.33.0", program="vllm", install="pip install vllm", key_variable="VLLM_API_KEY",
        tool_parsers={"hermes": "hermes", "internlm2": "internlm"},  # read in its repository
        refusal="vLLM 0.23 was the last with InternLM of 2023",
        unbiased=("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    ),
    "sglang": Peer(
        title="SGLang",
        version="0.5.23",
        program="sglang",
        install="pip install sglang",
        tool_parsers={"hermes": "hermes"},  # its parser of InternLM2 wants a space between two special tokens
        refusal="SGLang 0.5.23 has no InternLM of 2023",
        untied=("MixtralForCausalLM", "Qwen3MoeForCausalLM"),
        template_names={
            r"vicuna|llava-v1\.5|llava-next-video-7b": "vicuna_v1.1",
            r"llava-v1\.6-(yi-)?34b|llava-next-video-34b|llava-onevision-qwen2": "chatml-llava",
            "internvl": "internvl-2-5",
            r"moss.*vl": "moss-vl",
            "janus": "janus-pro",
            r"deepseek.*vl2": "deepseek-vl2",
            "deepseek-ocr": "deepseek-ocr",
            "unlimited": "unlimited-ocr",
            "paddleocr": "paddle-ocr",
            "phi-4-multimodal": "phi-4-mm",
            r"minicpm-v(?!-4[._][67])": "minicpmv",
            r"minicpm-o(?!-4[._][67])": "minicpmo",
            r"\bpoints\b": "points-v15-chat",
            "whisper": "whisper",
        },
    ),
    "llama.cpp": Peer(
        title="llama.cpp", version="0c1e570 (in llama-cpp-python 0.3.36)", program="llama-server",
        install="conda install -c conda-forge llama.cpp", key_variable="LLAMA_API_KEY",
        bare_chat="takes chatml",
    ),
}  # fmt: skip

ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
)  # fmt: skip
"""Classes of config.json that LMDeploy, vLLM and SGLang load without code from the folder."""
TURBOMIND = tuple(name for name in ARCHITECTURES if name != "MistralForCausalLM")
"""Classes that LMDeploy's TurboMind has; its PyTorch engine has all."""
TURBOMIND_HEADS = (64, 128, 192, 256)
"""Head sizes that TurboMind has attention kernels for (0.16 source, which the wheel of 0.18 lacks)."""
TURBOMIND_KV_HEAD = 128
"""Head size at which TurboMind keeps keys and values in 4 or 8 bits (0.16 documentation)."""


def _row(*cells: str) -> dict[str, str]:
    """Return a row, in the order of PEERS; what does not say how it is known was read in the source of the version."""
    given = zip(PEERS.items(), cells, strict=True)
    return {
        name: cell if cell.endswith("]") else f"{cell} [source {engine.version.split()[0]}]"
        for (name, engine), cell in given
    }


def _ran(says: str) -> str:
    """Return what llama.cpp did with an export of ours."""
    return f"{says} [ran {PEERS['llama.cpp'].version.split()[0]}]"


SUPPORT: dict[str, dict[str, str]] = {
    "InternLM of 2023 as published": _row("no since 0.15", "no; 0.23 was the last", "no", "no"),
    "our plain export": _row("yes", "yes", "yes", _ran("yes, as GGUF (logits compared)")),
    "biases of q, k, v and o": _row(
        "yes", "yes; Qwen3 classes have none on o", "yes", _ran("yes; not with norms of q and k"),
    ),
    "dynamic NTK past the trained length": _row(
        "TurboMind: per request [source 0.16.0]", "no: the base stays", "one fixed base; none at factor 1",
        "no",
    ),
    "chat format is read from": _row(
        "some names in the path, else the tokenizer; --chat-template hf: the tokenizer", "the tokenizer",
        "some names in the path, else the tokenizer", "the GGUF file",
    ),
    "ids that end an answer": _row(
        "list in generation_config.json", "list in generation_config.json", "list in generation_config.json",
        "eos, eot and eom of the file",
    ),
    "stop strings": _row("one token each; longer ones are dropped", "any", "any", "any"),
    "presence, frequency penalty": _row("accepted, no effect", "yes", "yes", "yes"),
    "logit bias": _row("PyTorch engine", "yes", "yes", "yes"),
    "logprobs": _row(
        "with --logprobs-mode; not in streamed completions", "yes", "yes", "yes; not with tools in a stream",
    ),
    "seed of a request": _row("yes", "yes", "with --enable-deterministic-inference", "yes"),
    "structured output": _row(
        "JSON schema, regex", "JSON schema, regex, grammar", "JSON schema, regex, grammar", "JSON schema, grammar",
    ),
    "tools": _row(
        "--tool-call-parser; no ReAct of InternLM 1", "--enable-auto-tool-choice --tool-call-parser; no ReAct",
        "--tool-call-parser; no ReAct, no InternLM2", "by the chat format",
    ),
    "prefix cache": _row("--enable-prefix-caching", "on", "on", "on, per slot"),
    "LoRA beside the base": _row(
        "PyTorch engine: --adapters", "--enable-lora --lora-modules", "--lora-paths", "--lora, as GGUF",
    ),
    "quantised weights": _row(
        "AWQ, GPTQ, fp8, mxfp4", "AWQ, GPTQ, fp8, int8 …", "AWQ, GPTQ, fp8, int8 …", "GGUF types; ours: q8_0",
    ),
    "quantised keys and values": _row(
        "--quant-policy 4, 8; TurboMind: head size 128 only [documented 0.16.0]", "--kv-cache-dtype",
        "--kv-cache-dtype", "--cache-type-k, --cache-type-v",
    ),
    "CPU": _row("no", "in a build of its own", "--device cpu", _ran("yes")),
    "several GPUs": _row("--tp", "--tensor-parallel-size", "--tp-size", "layers shared out"),
}  # fmt: skip
"""Feature → engine → claim."""


def markdown() -> str:
    """Return the table as Markdown: a row for each feature, a column for each engine."""
    rows = [["", *(f"{engine.title} {engine.version}" for engine in PEERS.values())], ["---"] * (len(PEERS) + 1)]
    rows += [[feature, *row.values()] for feature, row in SUPPORT.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
