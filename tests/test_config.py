"""The config tree: one road in, no typo unnoticed, frozen when it comes out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from config import KEYS, ConfigError, config_from_text, get_config, lookup, without_effect


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refused(cfg: str | None = None, opts: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        get_config(cfg, opts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_then_base_then_file_then_opts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "TRAIN: {EPOCHS: 90, BASE_LR: 1}\nTAG: base\n")
    child = write(tmp_path / "sub/child.yaml", "BASE: ['../base.yaml']\nTAG: child\n")
    config = get_config(child, ["TRAIN.WEIGHT_DECAY", "0.1"])
    assert (config.TRAIN.EPOCHS, config.TAG, config.TRAIN.WEIGHT_DECAY, config.TRAIN.MIN_LR) == (90, "child", 0.1, 5e-6)
    assert config.TRAIN.BASE_LR == 1.0 and isinstance(config.TRAIN.BASE_LR, float)
    assert get_config(child, ["TAG", "10"]).TAG == "10"  # a text stays a text


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        get_config().TRAIN.EPOCHS = 3


def test_dump_gives_the_same_config_back() -> None:
    config = get_config(None, ["DATA.IMG_SIZE", "[192, 256]", "MODEL.CROS.DEPTHS", "[1, 2]", "AUG.CUTMIX_MINMAX", "[0.2,0.8]"])
    assert config_from_text(config.dump()).dump() == config.dump()
    assert config.MODEL.CROSSFORMER.DEPTHS == [1, 2] and config.DATA.IMG_SIZE == [192, 256]


def test_every_key_is_explained_in_help() -> None:
    from config import describe_keys
    text = describe_keys()
    assert all(f"    {key.name} (" in text and len(key.meaning) > 5 for key in KEYS)
    assert len({key.name for key in KEYS}) == len(KEYS) and all(choice in text for key in KEYS for choice in key.choices)
    assert all(lookup(get_config(), key.name) is not Ellipsis for key in KEYS)


@pytest.mark.parametrize(("opts", "words"), [
    (["TRAIN.BASELR", "1"], ["unknown key TRAIN.BASELR", "TRAIN.BASE_LR"]),
    (["EPOCHS", "1"], ["unknown key EPOCHS", "TRAIN.EPOCHS"]),
    (["TRAIN.EPOCHS", "1.5"], ["TRAIN.EPOCHS takes a whole number, not '1.5'"]),
    (["TRAIN.EPOCHS"], ["pairs", "'TRAIN.EPOCHS' has no partner"]),
    (["TRAIN", "1"], ["TRAIN is a section"]),
    (["TRAIN.BASE_LR", "0"], ["TRAIN.BASE_LR is 0.0", "above 0"]),
    (["TRAIN.BASE_LR", "-1e-3"], ["above 0"]),
    (["TRAIN.BASE_LR", "nan"], ["TRAIN.BASE_LR takes a finite number"]),
    (["TRAIN.BASE_LR", "1e9"], ["no training survives"]),
    (["TRAIN.EPOCHS", "20"], ["TRAIN.WARMUP_EPOCHS is 20", "TRAIN.EPOCHS is 20"]),
    (["TRAIN.EPOCHS", "0"], ["TRAIN.EPOCHS is 0; it must be at least 1"]),
    (["MODEL.TYPE", "crosformer"], ["did you mean crossformer"]),
    (["DATA.IMG_SIZE", "0"], ["DATA.IMG_SIZE is 0"]),
    (["DATA.IMG_SIZE", "[1,2,3]"], ["a height and a width"]),
    (["AUG.MIXUP_PROB", "2"], ["between 0 and 1"]),
    (["AMP_OPT_LEVEL", "O3"], ["O0, O1, O2"]),
    (["TRAIN.AUTO_RESUME", "maybe"], ["true or false"]),
    (["MODEL.NUM_CLASSES", "-1"], ["must not be negative"]),
    (["DATA.STD", "[1,1,0]"], ["above 0"]), (["DATA.MEAN", "[1,1]"], ["3 numbers"]),
    (["SEED", "9" * 5000], ["SEED takes a whole number of at most 18 digits"]),
    (["SEED", "1e999999999"], ["SEED takes a whole number of at most 18 digits"]),
    (["DATA.IMG_SIZE", "1000000"], ["DATA.IMG_SIZE is 1000000", "16384"]),
    (["DATA.BATCH_SIZE", "1000000000000"], ["DATA.BATCH_SIZE is 1000000000000", "1,000,000"]),
    (["DATA.TIMEOUT", "1e300"], ["DATA.TIMEOUT is 1e+300", "10,000,000"]),
    (["DATA.NUM_WORKERS", "100000"], ["DATA.NUM_WORKERS", "1,024"]),
    (["AUG.SCALE", "[" * 400], ["AUG.SCALE takes a list"]),
    (["AUG.SCALE", "(" + "9" * 5000 + ", 1)"], ["AUG.SCALE takes a list"]),
    (["TRAIN.CHECKPOINT_BUDGET", "9" * 400], ["TRAIN.CHECKPOINT_BUDGET takes a size"]),
    (["TAG", "a\0b"], ["TAG takes a text"]),
    (["TAG", "\ud800"], ["TAG takes a text"]),
    (["TAG", "a\nb"], ["TAG is", "control characters"]),
    (["TAG", "x" * 300], ["TAG is", "200 bytes"]),
    (["OUTPUT", "a\x1b[31mb"], ["OUTPUT is", "control characters"]),
    (["BASE", "x.yaml"], ["BASE", "--cfg"]),
    (["X" * 100_000, "1"], ["unknown key"]),
    (["MODEL.CROSSFORMER.GROUP_SIZE", "[0,4]"], ["MODEL.CROSSFORMER.GROUP_SIZE is [0, 4]", "between 1 and"]),
    (["MODEL.CROSSFORMER.PATCH_SIZE", "[]"], ["MODEL.CROSSFORMER.PATCH_SIZE is []", "1 to 16"]),
    (["MODEL.CROSSFORMER.MERGE_SIZE", "[[]]"], ["MODEL.CROSSFORMER.MERGE_SIZE is [[]]", "1 to 16"]),
    (["MODEL.SWIN.DEPTHS", "[1000000]"], ["MODEL.SWIN.DEPTHS", "together at most 1,000"]),
])
def test_impossible_values_are_one_sentence(opts: list[str], words: list[str]) -> None:
    message = refused(opts=opts)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("text", "words"), [
    (b"TRAIN:\n  EPOCH: 3\n", ["bad.yaml:2: unknown key TRAIN.EPOCH", "TRAIN.EPOCHS"]),
    (b"TRAIN:\n  EPOCHS: 3\n  EPOCHS: 4\n", ["bad.yaml:3: TRAIN.EPOCHS stands twice"]),
    (b"TRAIN:\n\tEPOCHS: 3\n", ["bad.yaml:2: not valid YAML"]),
    (b"TRAIN: 3\n", ["bad.yaml:1: TRAIN is a section"]),
    (b"- a\n", ["mapping of sections"]),
    ("TAG: données\n".encode("latin-1"), ["not UTF-8"]),
    (b"BASE: [bad.yaml]\n", ["leads back to this file"]),
    (b"BASE: [other.yaml]\n", ["other.yaml: no such configuration file (named by BASE"]),
    (b"TAG: !!python/object/apply:os.system ['touch canary']\n", ["bad.yaml:1: TAG", "only plain values"]),
    (b"TRAIN:\n  EPOCHS: many\n", ["bad.yaml:2: TRAIN.EPOCHS takes a whole number"]),
    (b"BASE: 5\n", ["5: a configuration file ends in"]),
    (b"BASE: {a: 1}\n", ["bad.yaml:1: BASE takes a list of texts"]),
    (b'BASE: "\\0"\n', ["bad.yaml:1: BASE takes a text"]),
    (b'TAG: "\\ud800"\n', ["bad.yaml:1: TAG takes a text"]),
    (b'TAG: "\\UFFFFFFFF"\n', ["bad.yaml: not valid YAML"]),
    (b"TAG: a\x1bb\n", ["bad.yaml: not valid YAML"]),
    (b"TRAIN: " + b"[" * 1200, ["bad.yaml: not valid YAML (nested too deeply)"]),
    (b"SEED: " + b"[" * 100 + b"]" * 100, ["bad.yaml:1: SEED", "20 levels"]),
    (b"SEED: " + b"9" * 5000, ["bad.yaml:1: SEED", "18 digits"]),
    (b"SEED: 0x" + b"f" * 5000, ["bad.yaml:1: SEED", "18 digits"]),
    (b"SEED: !!int x\n", ["bad.yaml:1: SEED", "no int"]),
    (b"TRAIN: {FREEZE: &a [x, *a]}\n", ["bad.yaml:1: TRAIN.FREEZE", "20 levels"]),
    (b"TRAIN: {FREEZE: [" + b"&a0 [x, x]," + b",".join(b"&a%d [%s]" % (i, b"*a%d, " % (i - 1) * 9) for i in range(1, 12)) + b"]}",
     ["bad.yaml:1: TRAIN.FREEZE", "10,000 values"]),
    (b"#" * (1 << 20), ["bad.yaml: cannot be read (is larger than 262,144 bytes)"]),
])
def test_bad_files_name_file_and_line(tmp_path: Path, monkeypatch, text: bytes, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(write(tmp_path / "bad.yaml", text))
    assert all(word in message for word in words), message
    assert not (tmp_path / "canary").exists()


def test_whole_numbers_are_exact_and_texts_are_as_written(tmp_path: Path) -> None:
    config = get_config(write(tmp_path / "a.yaml", b"SEED: 9007199254740993\nTAG: 010\nMODEL: {NAME: on}\nOUTPUT: 2024-13-45\n"))
    assert (config.SEED, config.TAG, config.MODEL.NAME, config.OUTPUT) == (9007199254740993, "010", "on", "2024-13-45")
    assert get_config(opts=["SEED", "9007199254740993"]).SEED == 9007199254740993 and get_config(opts=["SEED", "1e3"]).SEED == 1000
    assert config_from_text(config.dump()).dump() == config.dump()


def test_a_pipe_a_folder_and_a_diamond_of_bases_are_sentences(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "no regular file" in refused(str(tmp_path / "pipe.yaml")) and "is a folder" in refused(str(tmp_path / "folder.yaml"))
    for number in range(12):
        write(tmp_path / f"{number}.yaml", f"BASE: [{number + 1}.yaml, {number + 1}.yaml]\n" if number < 11 else "")
    assert "more than 100 files" in refused(str(tmp_path / "0.yaml"))


def test_every_number_of_a_model_has_bounds() -> None:
    for key in KEYS:
        if key.name.startswith("MODEL.") and key.kind(None if key.default is None else key.default) is None:
            for value in (0, -1, [0], [[0]], [10**12]):
                try:
                    value = key.kind(value)
                except ValueError:
                    continue
                if isinstance(value, (bool, str)) or key.name.endswith(("PAD_TYPE", "SWIN.QK_SCALE")) or (value, key.rule) == (0, None):
                    continue
                if (key.name.endswith(("PADDINGS", "NUM_CONV", "NORM_EPS", "WINDOW_SIZES"))) and value in (0, [0]):
                    continue
                assert key.rule is not None and not key.rule.holds(value), (key.name, value)


def test_bom_crlf_and_an_empty_file_are_fine(tmp_path: Path) -> None:
    assert get_config(write(tmp_path / "a.yaml", b"\xef\xbb\xbfTRAIN:\r\n  EPOCHS: 33\r\n")).TRAIN.EPOCHS == 33
    assert get_config(write(tmp_path / "b.yaml", b"")).TRAIN.EPOCHS == 300


def test_python_config_files_are_not_run(tmp_path: Path) -> None:
    path = write(tmp_path / "cfg.py", "open('canary', 'w')\n")
    assert "ends in .yaml" in refused(path)


SWIN_FILE = """
DATA:
  IMG_SIZE: 384
MODEL:
  TYPE: swin
  NAME: swin_base_patch4_window12_384_22kto1k_finetune
  DROP_PATH_RATE: 0.2
  SWIN:
    EMBED_DIM: 128
    DEPTHS: [ 2, 2, 18, 2 ]
    NUM_HEADS: [ 4, 8, 16, 32 ]
    WINDOW_SIZE: 12
TRAIN:
  EPOCHS: 30
  WARMUP_EPOCHS: 5
  WEIGHT_DECAY: 1e-8
  BASE_LR: 2e-05
  WARMUP_LR: 2e-08
  MIN_LR: 2e-07
TEST:
  CROP: False
"""

CROSSFORMER_PP_FILE = """
MODEL:
  TYPE: cross-scale
  NAME: cros_pp_small_patch4_group_const_224
  DROP_PATH_RATE: 0.2
  CROS:
    EMBED_DIM: 64
    DEPTHS: [ 2, 2, 18, 2 ]
    NUM_HEADS: [ 2, 4, 8, 16 ]
    GROUP_SIZE: [ 4, 4, 14, 7 ]
    PATCH_SIZE: [ 4, 8, 16, 32 ]
    MERGE_SIZE: [[2, 4], [2, 4], [2, 4]]
    INTERVAL: [ 4, 2, 1, 1 ]
    GROUP_TYPE: constant
    USE_ACL: True
"""


@pytest.mark.parametrize(("text", "parameters", "prefix"), [
    (SWIN_FILE, 87_903_584, True),
    (CROSSFORMER_PP_FILE, 23_325_340, False),
    ("MODEL: {TYPE: cross-scale, NAME: cros_tiny_patch4_group7_224, DROP_PATH_RATE: 0.1, CROS: {EMBED_DIM: 64, "
     "DEPTHS: [1, 1, 8, 6], NUM_HEADS: [2, 4, 8, 16], GROUP_SIZE: [7, 7, 7, 7], PATCH_SIZE: [4, 8, 16, 32], "
     "MERGE_SIZE: [[2, 4], [2, 4], [2, 4]], MLP_RATIO: [4., 4., 4., 4.]}}", 27_776_794, False),
])
def test_files_of_the_repositories_are_read_as_they_are(tmp_path: Path, text: str, parameters: int, prefix: bool) -> None:
    from models import build_model
    config = get_config(write(tmp_path / "official.yaml", text))
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.TRAIN.LR_SCHEDULER.WARMUP_PREFIX is prefix
    if parameters == 27_776_794:
        assert [block.interval for stage in model.layers for block in stage.blocks] == [1, 1, *[1, 2] * 4, *[1, 1] * 3]
    if prefix:
        assert config.TRAIN.BASE_LR == 2e-5 and config.TRAIN.WEIGHT_DECAY == 1e-8


@pytest.mark.parametrize("task", ["detection", "instance", "semantic", "mask"])
def test_what_is_for_classification_is_left_out_of_dense_tasks(task: str) -> None:
    config = get_config(None, ["TASK", task])
    assert (config.AUG.MIXUP, config.AUG.AUTO_AUGMENT, config.MODEL.LABEL_SMOOTHING, config.AUG.HFLIP) == (0, "none", 0, 0.5)
    assert without_effect(config) == without_effect(config_from_text(config.dump())) == without_effect(get_config()) == []
    asked = get_config(None, ["TASK", task, "AUG.CUTMIX", "0.3", "MODEL.LABEL_SMOOTHING", "0.1", "AUG.MIXUP", "0"])
    assert without_effect(asked) == ["AUG.CUTMIX", "MODEL.LABEL_SMOOTHING"]
