from tests.checkpoints.fixtures import parent, tiny

__all__ = ["parent", "tiny"]
