"""A row of each format; its answer is red, or of a multiple choice (B). Its images are a.png and image/7.jpg."""

ASKED = {"role": "user", "content": "Which?"}
TRUE_ROWS = {
    "caption": {"image": "a.png", "caption": ["red", "a red one"]},
    "messages": {"messages": [ASKED, {"role": "assistant", "content": "red"}]},
    "llava": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}],
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]},
    "alpaca": {"instruction": "Which?", "input": "this", "output": "red"},
    "instruction": {"instruction": "Which?", "response": "red"},
    "minigpt4": {"image_id": "7", "caption": "red"},
    "vqa": {"image": "a.png", "question": "Which?", "answer": "red", "type": "color"},
    "choice": {"question": "Which?", "choices": ["blue", "red"], "answer": 1, "hint": "it burns"},
    "preference": {"prompt": "Which?", "chosen": "red", "rejected": "blue"},
}
