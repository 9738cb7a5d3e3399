"""The one error that a user sees: what is wrong, where, and what to do about it."""


class UserError(Exception):
    """Something the reader can fix, told in three parts and shown without a stack trace.

    what: what is wrong, with the offending value; where: a file with its line, or a setting; do: the next step.
    """

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        self.what, self.where, self.do = what, where, do
        super().__init__(f"{where}: {what}" if where else what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return (head + ("\n" if "\n" in head else " ") + self.do).strip()
