"""LLaVA and LLaVA-Med: a JSON array (or JSONL) of conversations, each about an image below --images.

    {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "A cat."}]}

`image` (or `images`) may be absent (text only) or a list. Read as `prepare messages` reads it: a question with one
image shows it first, wherever its `<image>` stands, as LLaVA's own code does. LLaVA-Med's misspelt "conversatons" is
read too.
"""

from __future__ import annotations

from data.prepare.sources import messages

LAYOUT, add_arguments = messages.LAYOUT, messages.add_arguments
units, documents = messages.units, messages.documents
