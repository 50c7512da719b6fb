"""The semantic search example's encoder as a service: a saved model, Paddle's inference predictor, and JSON over HTTP.

python -m examples.serving save [DIRECTORY]             the encoder as a static program, with its tokenizer
python -m examples.serving serve [DIRECTORY] [--port P] answers on 127.0.0.1 until it is stopped
python -m examples.serving query "text" "text" ...      how like the first text the others are
"""
