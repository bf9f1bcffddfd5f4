// Beside a frame of ra_lens: makes each as tall as it says it is, hides the text that stands for it
// where frames are not shown, and tells it whether the page around is dark.
(() => {
  if (window.raLensFrames) return;
  window.raLensFrames = true;
  const frames = () => document.querySelectorAll("iframe.ra-lens");
  const tell = (frame) => {
    // A frame cannot see its page, whose theme need not be the system's. Light text: a dark page.
    const [red, green, blue] = getComputedStyle(frame.parentElement).color.match(/[\d.]+/g);
    const light = Number(red) + Number(green) + Number(blue) > 382;
    frame.contentWindow.postMessage({ raLensTheme: light ? "dark" : "light" }, "*");
  };
  addEventListener("message", (event) => {
    const height = event.data && event.data.raLensHeight;
    if (!Number.isFinite(height) || height < 0) return;
    for (const frame of frames()) {
      if (frame.contentWindow !== event.source) continue;
      if (frame.dataset.fits) frame.style.height = `${Math.min(height, 20000)}px`;
      frame.previousElementSibling.style.display = "none";
      tell(frame);
    }
  });
  new MutationObserver(() => frames().forEach(tell)).observe(document.body, { attributes: true });
})();
