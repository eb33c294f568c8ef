"""What the model answers in full, dropped and healed, as HTML: side by side, beside what each takes."""

from html import escape

from llmdrop_vllm.data.comparison import Comparison, Form, Said

ENDINGS = {"length": ", cut there"}


def answers_section(found: Comparison) -> str:
    """A heading and each question with its answers; nothing that a model wrote is taken for HTML."""
    counted = f"KV cache is counted in {found.kv_dtype}. Marked: from where an answer parts from the full model's."
    parts = [
        '<section id="answers"><h2>The same questions to each</h2>',
        f'<p class="muted">{escape(counted)}</p>',
    ]
    for question, answers in found.exchanges():
        columns = "".join(_column(*each, *answers[0]) for each in answers)
        parts.append(f'<h3>{escape(question)}</h3><div class="answers">{columns}</div>')
    command = f"<code>{escape(found.provenance.command)}</code>"
    return "\n".join([*parts, f'<p class="muted">{escape(found.how)}. {command}</p></section>'])


def _column(form: Form, said: Said, full: Form, its: Said) -> str:
    kv, weights = (form.kv_bytes_per_token, full.kv_bytes_per_token), (form.weight_bytes, full.weight_bytes)
    sizes = f"KV per token {kv[0]:,} B{_change(*kv)}<br>weights {weights[0] / 1e6:,.0f} MB{_change(*weights)}"
    figures = f"{escape(form.summary)}<br>{sizes}"
    text = escape(said.same) + (f"<mark>{escape(said.other)}</mark>" if said.other else "")
    earlier = "" if said.other or said.same == its.same else ", ends earlier"
    tokens = f"{said.tokens:,} tokens{earlier}{ENDINGS.get(said.finish_reason, '')}"
    return (
        f'<article><h4>{form.name}</h4><p class="muted">{figures}</p><p class="text">{text}</p>'
        f'<p class="muted">{tokens}</p></article>'
    )


def _change(own: int, full: int) -> str:
    return "" if own == full else f" <b>{own / full - 1:+.1%}</b>"
