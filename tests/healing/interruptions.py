"""Runs that are interrupted at a layer."""


def interrupted_once(monkeypatch, run, step, at):
    """A run's step, which is for a layer, fails the first time that it comes to one; the layers that it came to."""
    do, begun = getattr(run, step), []

    def interrupted(self, index, bar):
        begun.append(index)
        if index == at and begun.count(at) == 1:
            raise KeyboardInterrupt
        return do(self, index, bar)

    monkeypatch.setattr(run, step, interrupted)
    return begun
