"""The chat page in Streamlit, as the README of InternLM has it; a client of any OpenAI-style server.

    internlm serve out                                        # in one terminal
    streamlit run web_demo.py                                 # in another
    streamlit run web_demo.py -- --url http://gpu:23333/v1    # a server elsewhere

INTERNLM_URL, INTERNLM_MODEL and INTERNLM_API_KEY do what the options do. Works with Streamlit 1.24 and later.
"""

from __future__ import annotations

import argparse
import os
import sys

import streamlit as st

from internlm.errors import InternLMError
from internlm.infer.client import Client

DEFAULT_URL = "http://127.0.0.1:8000/v1"


def read_options() -> argparse.Namespace:
    """Return which server to ask."""
    variables = os.environ
    parser = argparse.ArgumentParser(prog="streamlit run web_demo.py --", description="Chat with a served model.")
    parser.add_argument("--url", default=variables.get("INTERNLM_URL", DEFAULT_URL), help="default: %(default)s")
    parser.add_argument("--model", default=variables.get("INTERNLM_MODEL"), help="default: the first that it lists")
    parser.add_argument("--api-key", default=variables.get("INTERNLM_API_KEY"), help="if the server wants one")
    return parser.parse_args(sys.argv[1:])


def draw_sidebar() -> dict[str, float]:
    """Draw the settings and return them as the server's request has them."""
    with st.sidebar:
        most = st.slider("Max Length", min_value=32, max_value=16000, value=8000, help="tokens of an answer, at most")
        top_p = st.slider("Top P", 0.0, 1.0, 0.8, step=0.01)
        temperature = st.slider("Temperature", 0.0, 1.0, 0.8, step=0.01)
        st.button("Clear Chat History", on_click=lambda: st.session_state.pop("messages", None))
    return {"max_tokens": most, "top_p": top_p, "temperature": temperature}


def answer(client: Client, question: str, settings: dict[str, float]) -> None:
    """Show the answer while it comes; what came of it belongs to the history, even if it is stopped or fails."""
    history = st.session_state.messages
    asked = {"role": "user", "content": question}
    text = ""
    place = st.empty()
    try:
        with client.chat([*history, asked], **settings) as reply:
            for piece in reply:
                text += piece
                place.markdown(text + "▌")
    except InternLMError as error:
        st.error(str(error))
    finally:  # Streamlit's own Stop raises here too
        if text:
            history += [asked, {"role": "assistant", "content": text}]
    place.markdown(text)


def main() -> None:
    """Draw the page; Streamlit runs this again at every event."""
    st.set_page_config(page_title="InternLM")
    st.title("InternLM")
    options = read_options()
    settings = draw_sidebar()
    history = st.session_state.setdefault("messages", [])
    for message in history:
        with st.chat_message(message["role"]):
            st.markdown(message["content"])
    if question := st.chat_input("What is up?"):
        with st.chat_message("user"):
            st.markdown(question)
        with st.chat_message("assistant"):
            try:
                client = Client(options.url, options.model, (options.api_key or "").strip() or None)
            except InternLMError as error:
                st.error(str(error))
                return
            answer(client, question, settings)


if __name__ == "__main__":
    main()
