"""What a chat is, in one place: files of rows, message keys, chat templates, loss spans.

`formats` reads rows, `schema` checks what each holds, `templates` renders it with the tokenizer's chat template;
`spans` finds the answers in it; `conversations` and `pairs` give files in token ids, with the loss. A chat is rendered
and masked here and nowhere else. `base` is the template of models that are pretrained here.
"""
