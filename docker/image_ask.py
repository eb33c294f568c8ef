"""What the image's test asks from inside: which mask is served and a question; with `stream`, a long answer."""

import json
import sys
from urllib.request import Request, urlopen

SERVER = "http://127.0.0.1:8000"


def chat(**options: object) -> Request:
    question = {"role": "user", "content": "What is os.path.join?"}
    body = {"model": "embedded", "messages": [question], "temperature": 0, **options}
    headers = {"Content-Type": "application/json"}
    return Request(f"{SERVER}/v1/chat/completions", json.dumps(body).encode(), headers)


if sys.argv[1:] == ["stream"]:
    with urlopen(chat(stream=True, max_tokens=200, ignore_eos=True)) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choice = json.loads(line.removeprefix(b"data: "))["choices"][0]
                print(f"finished: {choice['finish_reason']}" if choice["finish_reason"] else ".", flush=True)
else:
    with urlopen(f"{SERVER}/v1/drop") as answer:
        dropped = sorted(json.load(answer)["mask"]["attention"])
    assert dropped == [7, 8, 10, 11], dropped
    with urlopen(chat(max_tokens=24)) as answer:
        text = json.load(answer)["choices"][0]["message"]["content"]
    assert text.strip(), "an empty answer"
    print(f"attention {dropped} dropped; it says {text!r}")
