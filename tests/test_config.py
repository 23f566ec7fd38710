"""The config tree: one road in, no typo unnoticed, frozen when it comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import KEYS, ConfigError, config_from_text, get_config, lookup


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
])
def test_bad_files_name_file_and_line(tmp_path: Path, monkeypatch, text: bytes, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(write(tmp_path / "bad.yaml", text))
    assert all(word in message for word in words), message
    assert not (tmp_path / "canary").exists()


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
