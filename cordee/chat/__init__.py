"""What a chat is, in one place: files of rows, message keys, chat templates, loss spans.

`formats` reads rows, `schema` checks what each holds, `templates` renders them with the tokenizer's chat template,
`spans` turns them into token ids and says where loss stands. A chat is rendered and masked here and nowhere else.
"""
