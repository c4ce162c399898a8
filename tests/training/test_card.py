"""The model card says what was trained, and whom to cite."""

from __future__ import annotations

from huggingface_hub import ModelCard

from fastd2o.training import OBJECTIVES
from fastd2o.training.card import PAPERS
from tests.training.tiny import make_model, make_rows


def test_every_objective_has_its_paper():
    assert set(PAPERS) == set(OBJECTIVES)


def test_card_of_a_run(make_trainer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        model=str(tmp_path / "base"),
        objective=["d2o", "npo"],
        objective_weights=[1.0, 0.25],
        beta=0.3,
        train_dataset=[*make_rows(4), {"prompt": "w1", "rejected": " w2"}],
        eval_dataset=make_rows(2),
    )
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert {"fastd2o", "d2o", "npo"} <= set(card.data.tags)
    for line in (
        "# out",
        "| **d2o** | [arXiv 2403.03419](https://arxiv.org/abs/2403.03419) |",
        "| beta | 0.3 |",
        "| weight | 0.25 |",
        "Reference: the model before training.",
        "dataset: 5 rows, 4 kept, 1 dropped, 0 repaired",
        "| learning_rate | 0.01 |",
        "eprint = {2404.05868}",
    ):
        assert line in card.text or line in card.content, line
    assert "| transformers | " in card.text
    assert str(tmp_path / "base") in card.text


def test_card_on_request(make_trainer, tmp_path):
    trainer = make_trainer(objective="orpo")
    trainer.create_model_card(model_name="kind", license="apache-2.0", tags="mine", dataset="a/b")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.datasets, card.data.model_name) == ("apache-2.0", "a/b", "kind")
    assert "mine" in card.data.tags
    assert "Reference: none." in card.text
