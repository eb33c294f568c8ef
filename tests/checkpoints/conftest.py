from tests.checkpoints.fixtures import parent

__all__ = ["parent"]
