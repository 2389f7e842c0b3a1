"""Runs PTX: an interpreter that checks what it runs, a real GPU through pycuda, and one Device interface over both."""
