"""What the tokens of a packed row see."""


def visible(row_lengths):
    """Of each token of a row those that it sees, itself last."""
    seen, start = [], 0
    for prompt, *completions in row_lengths:
        before = list(range(start, start + prompt))
        seen += [before[: i + 1] for i in range(prompt)]
        start += prompt
        for length in completions:
            seen += [[*before, *range(start, start + i + 1)] for i in range(length)]
            start += length
    return seen
