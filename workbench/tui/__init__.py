"""The terminal UI. It sends session command lines and shows what the session answers.

Read in this order: store.py (what the UI knows), keys.py (which key sends which line),
queries.py (what it asks for by itself), screens/main.py (how they meet), app.py.
"""
