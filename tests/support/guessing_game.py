"""An environment for the tests: the model guesses a number, and is told whether it was too low or too high."""


def environment(turns: list[str], row: dict) -> str | None:
    guess = int(turns[-1])
    return None if guess == row["secret"] else "low" if guess < row["secret"] else "high"


def says_a_number(turns: list[str], row: dict) -> int:
    return 7


def reward(completion: str, row: dict) -> float:
    return float(completion == str(row["secret"]))
