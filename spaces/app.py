"""The page as a Space of the Hub: all models that are here, on the address and the port that the Space names."""

from ttt_e2e.app import shipped_models
from ttt_e2e.app.launch import look
from ttt_e2e.app.page import build_page

demo = build_page(shipped_models([]))

if __name__ == "__main__":
    demo.launch(ssr_mode=False, max_file_size="512mb", **look())
