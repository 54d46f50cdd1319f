"""A training log that keeps its lines."""


class Lines:
    """Lines that stay, and those of the status line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.status: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def update(self, text: str) -> None:
        self.status.append(text)
