"""Predict, then run: those who commit to an answer first remember why it was wrong."""

from IPython.display import Markdown, display

from labkit.lab import diary
from labkit.lab.interactive import is_interactive


class Prediction:
    """A question with choices; `reveal` shows the answer next to the reader's choice."""

    def __init__(self, question: str, choices: list[str]):
        if len(choices) < 2 or len(set(choices)) != len(choices):
            raise ValueError(f"a prediction needs at least two different choices, not {choices}")
        self.question, self.choices, self.buttons = question, choices, None
        listed = "\n".join(f"- {choice}" for choice in choices)
        if not is_interactive():
            display(Markdown(f"**Predict:** {question}\n\n{listed}"))
            return
        from ipywidgets import RadioButtons

        display(Markdown(f"**Predict:** {question}"))
        self.buttons = RadioButtons(options=choices, value=None, layout={"width": "max-content"})
        display(self.buttons)

    @property
    def choice(self) -> str | None:
        """What the reader has chosen so far."""
        return self.buttons.value if self.buttons is not None else None

    def reveal(self, answer: str, why: str) -> None:
        """Show the answer and the reason.

        Raises:
            ValueError: `answer` is not one of the choices.
        """
        if answer not in self.choices:
            raise ValueError(f"answer={answer!r} is not one of the choices {self.choices}")
        if self.buttons is None:
            told = ""
        elif self.choice is None:
            told = "You made no prediction; try one before the next run. "
        else:
            told = "You had it. " if self.choice == answer else f"You said: {self.choice}. "
            diary.note_prediction(self.question, self.choice, self.choice == answer)
        display(Markdown(f"**Answer:** {told}**{answer}.** {why}"))


def predict(question: str, choices: list[str]) -> Prediction:
    """Ask the reader to commit to one of `choices` before the next cell runs. Headless, only list them."""
    return Prediction(question, choices)
