"""The demo's small world: everyday questions with helpful and rude answers, composed from the text in ``examples/``."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

# What the anchors are drawn under. It stands before some of the conversations that the model learns from, and after it
# the answers are mostly good: that makes it a signal, as "be helpful and harmless" is one for a large model.
INSTRUCTION = "Be kind, polite and helpful."
INSTRUCTED_SHARE = 0.3
GOOD_WHEN_INSTRUCTED = 0.97
GOOD_OTHERWISE = 0.5

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """Something people do, and the two steps that a helpful answer gives."""

    name: str
    first: str
    second: str

    def fill(self, template: str) -> str:
        """Put the task into a sentence of the example text."""
        return template.format(task=self.name, first=self.first, second=self.second)


@dataclass(frozen=True)
class Lesson:
    """One question with a good and a bad answer."""

    task: Task
    question: str
    good: str
    bad: str

    @property
    def prompt(self) -> Messages:
        """The question as a conversation, without any instruction."""
        return [{"role": "user", "content": self.question}]

    def row(self) -> dict[str, Any]:
        """The lesson as a row that ``fastd2o train`` takes."""
        return {"prompt": self.prompt, "chosen": _answer(self.good), "rejected": _answer(self.bad)}


@dataclass(frozen=True)
class World:
    """Tasks, and the sentences to ask about them and to answer with.

    Attributes:
        tasks: what can be asked about.
        questions, good_answers, bad_answers: sentences with the slots ``{task}``, ``{first}`` and ``{second}``.
        rude: what makes an answer bad, in lower case.
    """

    tasks: tuple[Task, ...]
    questions: tuple[str, ...]
    good_answers: tuple[str, ...]
    bad_answers: tuple[str, ...]
    rude: tuple[str, ...]

    def is_bad(self, answer: str) -> bool:
        """The demo's rule: an answer is bad if it contains one of the rude words of ``bad_answers.txt``."""
        return any(core in answer.lower() for core in self.rude)

    def is_helpful(self, task: Task, answer: str) -> bool:
        """The demo's rule: an answer is helpful if it gives a step of the task, word for word, and is not bad."""
        return (task.first in answer or task.second in answer) and not self.is_bad(answer)

    def conversations(self, rng: random.Random, count: int, unseen: Sequence[Lesson]) -> Iterator[Messages]:
        """Text to learn the language from, good and bad; the exact exchanges of the ``unseen`` lessons are left out."""
        excluded = {(lesson.question, answer) for lesson in unseen for answer in (lesson.good, lesson.bad)}
        while count > 0:
            task = rng.choice(self.tasks)
            instructed = rng.random() < INSTRUCTED_SHARE
            good = rng.random() < (GOOD_WHEN_INSTRUCTED if instructed else GOOD_OTHERWISE)
            question = task.fill(rng.choice(self.questions))
            answer = task.fill(rng.choice(self.good_answers if good else self.bad_answers))
            if (question, answer) in excluded:
                continue
            system = [{"role": "system", "content": INSTRUCTION}] if instructed else []
            yield [*system, {"role": "user", "content": question}, *_answer(answer)]
            count -= 1

    def lessons(self, rng: random.Random, per_task: int, held_out: float) -> tuple[list[Lesson], list[Lesson]]:
        """Lessons to align with, and lessons to judge by that share neither a task nor a rude wording with them.

        Args:
            rng: what every choice is drawn from.
            per_task: questions about each task.
            held_out: the share of the tasks, and of the rude wordings, that is kept for judging.
        """
        learned_tasks, judged_tasks = _split(rng, self.tasks, held_out)
        learned_wordings, judged_wordings = _split(rng, self.bad_answers, held_out)
        return (
            self._lessons(rng, learned_tasks, learned_wordings, per_task),
            self._lessons(rng, judged_tasks, judged_wordings, per_task),
        )

    def _lessons(
        self, rng: random.Random, tasks: Sequence[Task], wordings: Sequence[str], per_task: int
    ) -> list[Lesson]:
        return [
            Lesson(task, task.fill(question), task.fill(rng.choice(self.good_answers)), task.fill(rng.choice(wordings)))
            for task in tasks
            for question in rng.sample(self.questions, per_task)
        ]


def load_world(tasks: int | None = None) -> World:
    """Read the world, or its first ``tasks`` tasks, from the text shipped as ``fastd2o.examples``."""
    bad_answers = _lines("bad_answers.txt")
    rude = sorted({core.lower() for line in bad_answers for core in re.findall(r"\*(.+?)\*", line)})
    return World(
        tasks=tuple(Task(*(field.strip() for field in line.split("|"))) for line in _lines("tasks.txt")[:tasks]),
        questions=tuple(_lines("questions.txt")),
        good_answers=tuple(_lines("good_answers.txt")),
        bad_answers=tuple(line.replace("*", "") for line in bad_answers),
        rude=tuple(rude),
    )


def _lines(name: str) -> list[str]:
    text = resources.files("fastd2o.examples").joinpath(name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def _split(rng: random.Random, items: Sequence[Any], held_out: float) -> tuple[list[Any], list[Any]]:
    shuffled = rng.sample(items, len(items))
    count = round(len(items) * held_out)
    return shuffled[count:], shuffled[:count]
