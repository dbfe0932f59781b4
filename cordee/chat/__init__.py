"""What a chat is, in one place: files of rows, message keys, chat templates, loss spans.

`formats` reads rows, `schema` checks what each holds, `templates` renders them with the tokenizer's chat template,
`spans` finds where loss stands, `tokens` gives whole files in token ids. A chat is rendered and masked here and nowhere
else. `base` is the template of models that are pretrained here.
"""
