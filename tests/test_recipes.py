"""The recipes start as they are, with local stand-ins for what is on the Hub."""

import io
import itertools
import json
import runpy

import pytest
from conftest import ROOT

import dapo
import tools.chat
import tools.evaluate

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def stand_in(folder, recipe):
    """A data set of the shape of the recipe's, as a folder like those on the Hub."""
    folder.mkdir()
    if recipe.startswith("gsm8k"):
        rows = [
            {"question": f"Tom has {n} apples.", "answer": f"He has <<{n}={n}>>{n}.\n#### {n}"} for n in range(10, 18)
        ]
    else:
        rows = [
            {
                "data_source": "math_dapo",
                "prompt": [{"content": f"Solve it. Answer: $Answer.\n\nTom has {n} apples.", "role": "user"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(n), "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": str(n)},
            }
            for n in range(10, 18)
        ] * 3  # questions repeat
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    return str(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_makes_the_papers_16_updates_a_batch(recipe):
    """Unlike the toy's constants, which it would inherit."""
    constants = dapo.CONSTANTS | runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))
    assert constants["DAPO_EPOCHS"] * constants["MINI_BATCHES"] == 16


BY_LORA = "gsm8k_3b", "gsm8k_7b"


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=pytest.mark.lora if r in BY_LORA else ()) for r in RECIPES])
def test_a_recipe_starts(recipe, main, make_folder, set_reward, no_pictures, tmp_path, monkeypatch, capsys):
    """Two steps with a tiny model, an evaluation, and a saved model that tools.evaluate and tools.chat take."""
    coin = itertools.cycle([1.0, 0.0, 0.0])
    set_reward(lambda **response: {"score": 1.0, "acc": next(coin), "pred": ""})
    place, settings = stand_in(tmp_path / recipe, recipe), runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))
    small = dict(
        MODEL=make_folder(),
        OUTPUT_DIR=tmp_path / "run",
        DEVICE="cpu",
        NUM_STEPS=2,
        EVAL_SAMPLES=min(2, settings.get("EVAL_SAMPLES", 1)),
        BATCH_SIZE=4,
        GROUP_SIZE=3,
        MINI_BATCHES=2,
        MAX_PROMPT_LENGTH=200,
        MAX_RESPONSE_LENGTH=16,
        OVERLONG_BUFFER_LENGTH=4,
    )
    for name in ("TRAIN_DATASETS", "EVAL_DATASETS"):
        small[name] = [source | {"path": place} for source in settings[name]]
    words = [str(ROOT / f"recipes/{recipe}.py"), *(f"--{name}={value}" for name, value in small.items())]
    main(words)
    said = capsys.readouterr().out
    assert "step 0: eval/accuracy" in said and "step 2: eval/accuracy" in said
    assert ("16 of 24 rows" in said) == (not recipe.startswith("gsm8k"))
    tools.evaluate.main([*words, str(tmp_path / "run")])
    assert "8 questions" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Tom?")))
    tools.chat.main([*words, str(tmp_path / "run")])
    assert "[answer: " in capsys.readouterr().out
