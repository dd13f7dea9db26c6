"""Hostile and damaged adapter folders: each made from a good one by one change after which it means something else,
or nothing.

A change that leaves the meaning as it is (a flipped bit in the padding of a header, or in the name of the base) is
none of these: places are drawn from what counts, and what was drawn is compared with what was there.
"""

import json
import os
import pickle
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from labkit.formats.peft_folder import CONFIG, WEIGHTS
from labkit.formats.provenance import PROVENANCE, seal

Damage = Callable[[Path, random.Random], None]
# what PEFT itself passes over when it computes
NO_MEANING = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}
BOMB = r"((\w|\.)*)*!"  # matches nothing, after 2^n ways


def flip(path: Path, chance: random.Random, begin: int, end: int) -> None:
    """Flip one bit in these bytes of a file."""
    raw, place = bytearray(path.read_bytes()), chance.randrange(begin, end)
    raw[place] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)


def header_length(path: Path) -> int:
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def some(chance: random.Random, tensors: dict) -> str:
    return chance.choice(sorted(tensors))


# --- the tensors


def cut_weights(folder: Path, chance: random.Random) -> None:
    path = folder / WEIGHTS
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip_data(folder: Path, chance: random.Random) -> None:
    path = folder / WEIGHTS
    flip(path, chance, 8 + header_length(path), path.stat().st_size)


def flip_header(folder: Path, chance: random.Random) -> None:
    """Not in the padding at its end, nor in `__metadata__`, which says nothing of a tensor."""
    path = folder / WEIGHTS
    raw = path.read_bytes()[8 : 8 + header_length(path)]
    first, last = re.search(rb'"__metadata__":\{[^}]*\},?', raw).span()
    begin, end = chance.choice([(1, first)] * (first > 1) + [(last, len(raw.rstrip()))])
    flip(path, chance, 8 + begin, 8 + end)


def bomb_header(folder: Path, chance: random.Random) -> None:
    length = chance.choice(
        [2**63 - 1, 2**64 - 1, 2**40, 2**25, 100_000_000_000, (folder / WEIGHTS).stat().st_size]
    )
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[:8] = struct.pack("<Q", length)
    (folder / WEIGHTS).write_bytes(raw)


def write_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


def strange_header(folder: Path, chance: random.Random) -> None:
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    name = b"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    headers = [
        b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" + one + b"," + one + b"}", b'{"a":' * 100_000,
        b"[" * 1_000_000, b'{"a":{"dtype":"F32","shape":[1]}}', b"{" + one.replace(b"[1]", b"[-1]") + b"}",
        b"{" + one.replace(b"[1]", b"[1e30]") + b"}", b"{" + one.replace(b"0,4", b"0,400000000000") + b"}",
        b"{" + one.replace(b"[1]", b"[" + b"9" * 5000 + b"]") + b"}", b"{" + one.replace(b'"a"', b'"' + name + b'"') + b"}",
        b"{" + one.replace(b"F32", b"PICKLE") + b"}", b'{"__metadata__":7}', b"[" + b"{}," * 1_000_000 + b"{}]",
        b'{"a":[' + b"[]," * 5_500_000 + b"[]]}",
        b"{" + one.replace(b'"a"', b'"' + b"a" * 1_000_000 + b'"') + b"}",
    ]  # fmt: skip
    write_header(folder, chance.choice(headers), b"\0" * 4)


def same_name_twice(folder: Path, chance: random.Random) -> None:
    """Two entries of one name: readers differ in which of them counts."""
    path = folder / WEIGHTS
    size, raw = header_length(path), path.read_bytes()
    header = json.loads(raw[8 : 8 + size])
    name = some(chance, {k: v for k, v in header.items() if k != "__metadata__"})
    text = raw[8 : 8 + size].rstrip()[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    write_header(folder, text, raw[8 + size :])


def overlapping(folder: Path, chance: random.Random) -> None:
    """Two tensors in the same bytes."""
    path = folder / WEIGHTS
    size, raw = header_length(path), path.read_bytes()
    header = json.loads(raw[8 : 8 + size])
    names = sorted(set(header) - {"__metadata__"})
    one, other = chance.sample(names, 2) if len(names) > 1 else (names[0], names[0])
    header[one]["data_offsets"] = header[other]["data_offsets"] if one != other else [4, 8]
    write_header(folder, json.dumps(header).encode(), raw[8 + size :])


def wrong_shape(folder: Path, chance: random.Random) -> None:
    def change(tensors: dict) -> None:
        key = some(chance, tensors)
        tensor = tensors[key]
        longer = torch.cat([tensor, tensor[:1]])
        ways = [tensor[None], tensor.flatten()[: tensor.numel() - 1], longer, tensor[:0], torch.tensor(1.0)]
        tensors[key] = chance.choice(ways).clone().contiguous()

    change_tensors(folder, change)


def wrong_dtype(folder: Path, chance: random.Random) -> None:
    kinds = ["int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]

    def change(tensors: dict) -> None:
        key = some(chance, tensors)
        tensors[key] = tensors[key].to(getattr(torch, chance.choice(kinds)))

    change_tensors(folder, change)


def not_finite(folder: Path, chance: random.Random) -> None:
    def change(tensors: dict) -> None:
        key = some(chance, tensors)
        tensor = tensors[key].double() if chance.random() < 0.2 else tensors[key]
        worst = ["nan", "inf", "-inf"] + ["1e300"] * (tensor.dtype == torch.float64)  # too large for fp32
        tensor.view(-1)[chance.randrange(tensor.numel())] = float(chance.choice(worst))
        tensors[key] = tensor

    change_tensors(folder, change)


def names_and_numbers(folder: Path, chance: random.Random) -> None:
    """One too few, one too many, one of another name."""
    strange = [
        "../../../etc/passwd", "base_model.model.__class__.lora_A.weight", "base_model.model...lora_A.weight", "",
        "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight", "prompt_embeddings2", "a" * 100_000,
        "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.base_layer.weight", "\0",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "base_model.model.weight",
    ]  # fmt: skip

    def change(tensors: dict) -> None:
        key = some(chance, tensors)
        what = chance.randrange(3)
        if what != 1:
            taken = tensors.pop(key)
        if what == 1:
            tensors[chance.choice(strange)] = torch.ones(1)
        elif what == 2:
            tensors[chance.choice(strange)] = taken

    change_tensors(folder, change)


def other_numbers(folder: Path, chance: random.Random) -> None:
    """Well-formed, and not what was saved."""
    change_tensors(folder, lambda tensors: tensors[some(chance, tensors)].mul_(1.01).add_(0.001))


class RunsCode:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(folder: Path, chance: random.Random) -> None:
    code = pickle.dumps(RunsCode(folder / "ran"))
    (folder / WEIGHTS).unlink()
    (folder / chance.choice([WEIGHTS, "adapter_model.bin"])).write_bytes(code)


# --- places


def no_file(folder: Path, chance: random.Random) -> None:
    """A pipe, a folder, an endless device, a link to nowhere or out of the folder, in place of a file."""
    name = chance.choice([WEIGHTS, CONFIG, PROVENANCE])
    path = folder / name
    path.unlink()
    ways = ["pipe", "folder", "/dev/zero", "/dev/urandom", "/etc/passwd", "round", "/proc/self/mem"]
    way = chance.choice(ways if name == PROVENANCE else [*ways, "gone", "missing"])
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way != "missing":
        path.symlink_to({"gone": "nowhere", "round": name}.get(way, way))


# --- the configuration


def cut_config(folder: Path, chance: random.Random) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[: chance.randrange(len(text.rstrip()))])


def flip_in(path: Path, chance: random.Random, meaning: Callable[[dict], object]) -> None:
    """Flip one bit of a JSON file, drawn again until the file says something else."""
    good = path.read_bytes()
    while True:
        path.write_bytes(good)
        flip(path, chance, 0, len(good))
        try:
            if meaning(json.loads(path.read_bytes().decode())) != meaning(json.loads(good)):
                return
        except (ValueError, AttributeError):
            return


def flip_config(folder: Path, chance: random.Random) -> None:
    flip_in(folder / CONFIG, chance, lambda raw: {k: v for k, v in raw.items() if k not in NO_MEANING and v})


def key_twice(folder: Path, chance: random.Random) -> None:
    path = folder / chance.choice([CONFIG, PROVENANCE])
    text = path.read_text().rstrip()
    key = chance.choice(sorted(json.loads(text)))
    path.write_text(text[:-1] + f', "{key}": 1}}')


WRONG = [
    True,
    -1,
    0.5,
    10**30,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [1],
    [None],
    {"a": {}},
    {"(": 1},
    {"q": None},
]
KEYS = {
    "peft_type": ["LOHA", "lora", "IA4", None, 7, [], {}],
    "r": [0, *WRONG], "lora_alpha": [0, 1e39, 1e-46, "16", None, [], {}, True, float("nan")],
    "lora_dropout": [1, 1.5, -0.1, "0", [], {"a": 1}, True],
    "target_modules": [7, True, {"a": 1}, [1], [None], [["q_proj"]], "(", "a++", [], "", ["w9"], 0.5],
    "exclude_modules": [7, True, {"a": 1}, [1], "(", ".*", ["q_proj"]],
    "layers_to_transform": ["0", [0.5], [-1], [99], True, {"a": 1}, [None], 10**30],
    "rank_pattern": [[1], 7, "x", {"q_proj": 0}, {"q_proj": True}, {"q_proj": "4"}, {"q_proj": 10**30}, {"(": 4},
                     {"q_proj": None}, {"q_proj": [4]}, {"q_proj": 2}],
    "alpha_pattern": [[1], 7, "x", {"q_proj": 0}, {"q_proj": True}, {"q_proj": "4"}, {"q_proj": 1e39}, {"(": 4}],
    "modules_to_save": [7, "score", True, [1], ["../../x"], ["lm_head"], {"a": 1}, [None]],
    "use_rslora": [1, "true", [1], {"a": 1}, 0.5], "use_dora": [1, "true", [1], {"a": 1}, True],
    "fan_in_fan_out": [1, "true", [1]],
    "init_lora_weights": ["corda", "loftq", "pissa_niter_1000000000", "lora_ga", 7, [], {}],
    "bias": ["all", "lora_only", True, None, [], 1], "lora_bias": [True, 1, "x"],
    "use_qalora": [True, "x"], "layer_replication": [[[0, 4], [2, 5]]], "target_parameters": [["experts.w1"]],
    "trainable_token_indices": [[1], {"embed_tokens": [1]}], "alora_invocation_tokens": [[1, 2]],
    "arrow_config": [{"top_k": 1}], "ensure_weight_tying": [True], "a_key_of_the_future": [True, 1, "x", [0], {"a": 1}],
    "__class__": ["x"], "": [1], "loss_scale": [2.0],
}  # fmt: skip


def wrong_value(folder: Path, chance: random.Random) -> None:
    key = chance.choice(sorted(KEYS))
    change_json(folder / CONFIG, lambda raw: raw.update({key: chance.choice(KEYS[key])}))


def regex_bomb(folder: Path, chance: random.Random) -> None:
    nested = "(" * 40 + ".?" + "){2}" * 40 + "z"  # no set of places helps: refused by its form
    bombs = {
        "target_modules": [BOMB, "(a|a|.)*!", r"(.*)*(.*)*(.*)*!", nested, r"(\w|\.)*\1!", ".*" * 3000],
        "exclude_modules": [f"{BOMB}|.*", "((.*)*)*", nested, "(a*)*" * 900],
        "rank_pattern": [
            {f"{BOMB}|.*": 3},
            {nested: 3},
            {".*" * 3000: 3},
            {f".*{i}.*.*": 3 for i in range(5000)},
        ],
        "alpha_pattern": [{nested: 3}, {".*" * 3000: 3}, {f".*{i}.*.*": 3 for i in range(5000)}],
        "layers_pattern": [[BOMB], BOMB, [nested], [".*" * 3000]],
    }
    key = chance.choice(sorted(bombs))

    def change(raw: dict) -> None:
        raw[key] = chance.choice(bombs[key])
        if key == "layers_pattern":
            raw["layers_to_transform"] = [0]

    change_json(folder / CONFIG, change)


def strange_json(folder: Path, chance: random.Random) -> None:
    text = (folder / CONFIG).read_text()
    ways = [
        b"", b"[]", b"null", b"7", b'"LORA"', b"{}", b'{"peft_type": "LORA"}', b"\xff", text.encode("utf-16"),
        b"\xef\xbb\xbf" + text.encode(), b"[" * 1_000_000, b'{"a":' * 100_000, b"[" + b"[]," * 1_000_000 + b"[]]",
        text.replace('"LORA"', "L" * 10).encode(), b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}', b'{"peft_type": "LORA", "lora_alpha": 8, "r": [' + b"1," * 500_000 + b"1]}",
    ]  # fmt: skip
    name = chance.choice([CONFIG, PROVENANCE])
    (folder / name).write_bytes(chance.choice(ways))


def huge_json(folder: Path, chance: random.Random) -> None:
    """100 MB, most of it a hole in the file."""
    os.truncate(folder / chance.choice([CONFIG, PROVENANCE]), 100_000_000)


def from_another(folder: Path, chance: random.Random) -> None:
    """A file of another adapter, which is good in its own folder."""
    name = chance.choice([CONFIG, WEIGHTS, PROVENANCE])
    (folder / name).write_bytes((folder.parent / "other" / name).read_bytes())


# --- labkit.json


def cut_record(folder: Path, chance: random.Random) -> None:
    text = (folder / PROVENANCE).read_text()
    (folder / PROVENANCE).write_text(text[: chance.randrange(len(text.rstrip()))])


def flip_record(folder: Path, chance: random.Random) -> None:
    flip_in(folder / PROVENANCE, chance, lambda raw: raw)


def wrong_record(folder: Path, chance: random.Random) -> None:
    """An entry missing, too many, of another type, or changed."""

    def change(raw: dict) -> None:
        inside = chance.choice([raw, raw["base"], raw["hashes"], *([raw["start"]] if "start" in raw else [])])
        key = chance.choice(sorted(set(inside) - {"start"}))
        what = chance.randrange(3)
        if what == 0:
            del inside[key]
        elif what == 1:
            inside["another"] = 1
        else:
            inside[key] = chance.choice([w for w in (7, [1], {"a": 1}, "x", True, ["x"]) if w != inside[key]])

    change_json(folder / PROVENANCE, change)


def sealed_again(folder: Path, chance: random.Random) -> None:
    """A record changed by somebody who knows how its hash is made."""
    path = folder / PROVENANCE
    raw = json.loads(path.read_text())
    del raw["hashes"]
    base = raw["base"]
    changes = [
        lambda: base.update(linears="0" * 64), lambda: base.update(rest="0" * 64), lambda: base.update(shapes="0" * 64),
        lambda: base.update(linears_kind="x"), lambda: base.update(rest_kind="torch.float31"), base.clear,
        lambda: raw.update(start=7), lambda: raw.update(replaces=7), lambda: raw.update(start={"init": "loftq"}),
    ]  # fmt: skip
    if "start" in raw:
        start = raw["start"]
        settings = start["quantization"]
        changes = [
            lambda: settings.update(blocksize=128), lambda: settings.update(codebook="fp4"),
            lambda: settings.update(codebook="zz"), lambda: settings.update(blocksize=-64),
            lambda: settings.update(compute_dtype="load"), lambda: settings.update(future=True),
            lambda: settings.update(double_quant=False), lambda: start.update(init="pissa_niter_1000000000"),
            lambda: start.update(init="loftq_iter_1000000000"), lambda: start.update(init="pissa_niter_4"),
            lambda: start.update(init="default"), lambda: start.update(init="loftq_iter_3"),
            lambda: start["origin"].update(linears="0" * 64), lambda: start["origin"].update(linears_kind="torch.bfloat16"),
            lambda: base.update(linears="0" * 64), lambda: base.update(linears_kind="nf4/128/double"),
        ]  # fmt: skip
    chance.choice(changes)()
    path.write_text(
        json.dumps(seal(raw, load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())))
    )


# by the folders that a change is made in (see `good_folders` of the tests): of a folder of PEFT, which has no
# hashes, only what is wrong in itself
OF_TENSORS: list[Damage] = [
    cut_weights, flip_header, bomb_header, strange_header, same_name_twice, overlapping, wrong_shape, wrong_dtype,
    not_finite, names_and_numbers, pickled,
]  # fmt: skip
OF_CONFIG: list[Damage] = [cut_config, wrong_value, wrong_value, regex_bomb]
HASHED: list[Damage] = [
    flip_data, flip_data, other_numbers, flip_config, key_twice, strange_json, huge_json, from_another, cut_record,
    flip_record, wrong_record, sealed_again, no_file,
]  # fmt: skip
DAMAGES: dict[str, list[Damage]] = {
    "lora": OF_TENSORS + OF_CONFIG + HASHED,
    "peft": OF_TENSORS + OF_CONFIG,
    "full": [wrong_shape, wrong_dtype, not_finite, flip_header, flip_data, names_and_numbers],
    "loftq": [
        sealed_again,
        sealed_again,
        sealed_again,
        flip_record,
        wrong_record,
        flip_data,
        wrong_shape,
        not_finite,
    ],
    "ia3": OF_TENSORS + HASHED,
    "prompt": [
        cut_weights,
        wrong_shape,
        wrong_dtype,
        not_finite,
        flip_data,
        flip_config,
        flip_record,
        bomb_header,
    ],
    "prefix": [
        cut_weights,
        wrong_shape,
        wrong_dtype,
        not_finite,
        flip_data,
        flip_config,
        sealed_again,
        pickled,
    ],
}


def cases(number: int, seed: int) -> list[tuple[str, Damage, int]]:
    """(kind of folder, change, seed of the change), each kind of change at least once if there is room."""
    chance = random.Random(seed)
    pairs = [(kind, damage) for kind, damages in DAMAGES.items() for damage in damages]
    chance.shuffle(pairs)
    first: dict[Damage, tuple[str, Damage]] = {damage: (kind, damage) for kind, damage in pairs}
    order = [*first.values(), *pairs]
    return [(*order[i % len(order)], chance.randrange(2**32)) for i in range(number)]
