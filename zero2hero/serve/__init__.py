"""The OpenAI-compatible server: existing clients talk to a model of ours.

Read in this order: app.py (the routes), schema.py (what a request may say), completions.py and chat.py (from a request
to answers), worker.py (the thread in which the model runs), answers.py (sending them, streamed or whole), security.py.
"""
