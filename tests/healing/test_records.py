"""What the record of a healing says of itself."""

from llmdrop_vllm.artifacts import HEAL_FILE, write_record
from llmdrop_vllm.healing.records import healing_of
from tests.healing.records import TRAINING, healing

CLOSED = (
    "2 layers healed on 5,000 tokens of answers.jsonl, leaving 60% to 80% of each one's error, and attention refitted "
    "in 1 behind the first"
)


def test_one_line_says_what_was_gained_and_what_was_not():
    assert healing().summary() == f"{CLOSED}; nothing helped in 11"
    trained = healing(training=TRAINING)
    assert trained.summary() == f"{CLOSED}; trained, KL 0.250 to 0.150; nothing helped in 11"
    assert (healing().method, trained.method) == ("healed", "trained")
    # What training did not better was not kept.
    assert healing(training=TRAINING.model_copy(update={"tensors": ()})).method == "healed"


def test_a_checkpoint_says_how_it_was_healed_if_it_was(tmp_path):
    assert healing_of(tmp_path) is None
    write_record(healing(), tmp_path / HEAL_FILE)
    assert healing_of(tmp_path) == healing()
