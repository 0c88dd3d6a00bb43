// Scripts that run from right to left are shown as such; what Gradio leaves without a name gets one.
() => {
  const direct = () => {
    for (const area of document.querySelectorAll("#prompt textarea, #option-negative_prompt textarea")) {
      area.dir = "auto";
    }
  };
  new MutationObserver(direct).observe(document.body, { childList: true, subtree: true });
  direct();
}
