"""What Ollama and LM Studio want beside a GGUF file: a `Modelfile`, and a few lines on where to put the file.

llama.cpp reads the chat template in the file. Ollama has templates in a language of its own, and takes over only those
that it knows. So the `Modelfile` says one itself where the tokenizer's is ChatML, with the system message that it
begins with; a model without a template gets the bare prompt.

Neither program is run here.
"""

from pathlib import Path

from labkit.files.writing import new_file
from labkit.formats.gguf_file import MAGIC

MODELFILE, LM_STUDIO = "Modelfile", "LM_STUDIO.md"
QUOTES = '"""'
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
ASKED, ANSWERED = "a question", "an answer"


def save_modelfile(
    model: str | Path, tokenizer, adapter: str | Path | None = None, context: int | None = None
) -> Path:
    """Write a `Modelfile` for Ollama and `LM_STUDIO.md` into the folder of a GGUF file.

    Args:
        model: the GGUF file of a model, merged or the base of `adapter`.
        tokenizer: the model's own.
        adapter: a GGUF adapter in the same folder.
        context: tokens of the longest text, for Ollama, whose default is small; default: what the tokenizer says.

    Returns:
        The path of the `Modelfile`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file; the adapter is in another folder.
        FileExistsError: another file stands where one of the two would.
        labkit.files.CannotWrite: no space, no permission.
    """
    model = Path(model)
    check_gguf(model)
    if adapter is not None:
        check_gguf(Path(adapter))
        if Path(adapter).resolve().parent != model.resolve().parent:
            raise ValueError(
                f"{adapter} is not in the folder of {model}; a Modelfile names both beside itself"
            )
    beside = None if adapter is None else Path(adapter).name
    made = {
        model.parent / MODELFILE: modelfile(model.name, tokenizer, beside, context),
        model.parent / LM_STUDIO: lm_studio(model.name, beside),
    }
    for path, text in made.items():
        if (
            path.exists()
            and path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0] != text.split("\n", 1)[0]
        ):
            raise FileExistsError(f"{path} is there, and was not written here; it is left as it is")
    for path, text in made.items():
        with new_file(path) as part:
            part.write_text(text, encoding="utf-8")
    return model.parent / MODELFILE


def check_gguf(path: Path) -> None:
    """Raise unless `path` is a GGUF file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; write it first, with labkit.formats.save_gguf")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file; labkit.formats.save_gguf writes one")


def modelfile(model: str, tokenizer, adapter: str | None, context: int | None) -> str:
    """The text of a `Modelfile`."""
    lines = ["# ollama create my-model -f Modelfile", f"FROM ./{model}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    system = chatml_system(tokenizer)
    if tokenizer.chat_template is None:
        lines.append(f"TEMPLATE {QUOTES}{{{{ .Prompt }}}}{QUOTES}")
    elif system is not None:
        lines.append(f"TEMPLATE {QUOTES}{CHATML}{QUOTES}")
        if system:
            lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    else:
        lines.append(
            "# The chat template is in the GGUF file. If Ollama does not know it, write it here: TEMPLATE …"
        )
    stops = ["<|im_end|>"] if system is not None else []
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys([*stops, tokenizer.eos_token]) if stop]
    longest = tokenizer.model_max_length if context is None else context
    if longest < 10**9:  # transformers says 10³⁰ where it does not know
        lines.append(f"PARAMETER num_ctx {longest}")
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def chatml_system(tokenizer) -> str | None:
    """The system message that a ChatML template begins with, "" if none; None if the template is not ChatML."""
    if not isinstance(tokenizer.chat_template, str):
        return None

    def turn(role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    messages = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": ANSWERED},
        {"role": "user", "content": ASKED},
    ]
    rest = "".join(turn(m["role"], m["content"]) for m in messages) + "<|im_start|>assistant\n"
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program of its own, and may refuse these messages
        return None
    if text == rest:
        return ""
    start, end = turn("system", "\n").split("\n\n")
    begins = text.removesuffix(rest)
    if begins == text or not (begins.startswith(f"{start}\n") and begins.endswith(end)):
        return None
    return begins[len(start) + 1 : -len(end)]


def lm_studio(model: str, adapter: str | None) -> str:
    """The text of `LM_STUDIO.md`."""
    text = (
        "# In LM Studio\n\n"
        f"    lms import {model}\n\n"
        f"or copy the file to `~/.lmstudio/models/you/{Path(model).stem}/{model}`; then it is in the list of models. The "
        "chat template and the tokens that end an answer are in the file. Set the temperature to 0 to compare answers.\n"
    )
    if adapter:
        text += (
            f"\nLM Studio puts no adapter on a model: `{adapter}` is for llama.cpp (`--lora {adapter}`) and Ollama. Merge it "
            "first, with labkit.formats.save_gguf, and import that file.\n"
        )
    return text
