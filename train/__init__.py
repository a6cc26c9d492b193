"""The trainer: `python -m train.main --config=configs/digits.py:cnn,deconv --workdir=runs/x`."""
