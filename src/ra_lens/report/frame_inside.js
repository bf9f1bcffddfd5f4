"use strict";
// In the frame of a notebook: tells the page around how tall this one is, and takes light or dark
// from it. Nothing else passes.
(() => {
  const root = document.documentElement;
  let told = 0;
  const tell = () => {
    const height = Math.ceil(document.body.getBoundingClientRect().height);
    if (height !== told) parent.postMessage({ raLensHeight: told = height }, "*");
  };
  tell();  // now, as browsers observe nothing in a frame that is out of sight
  new ResizeObserver(tell).observe(document.body);

  const isDark = /prefers-color-scheme:\s*dark/;
  const dark = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules])
    .filter((rule) => rule.media && isDark.test(rule.media.mediaText));
  addEventListener("message", (event) => {
    const theme = event.data && event.data.raLensTheme;
    if (event.source !== parent || (theme !== "light" && theme !== "dark")) return;
    if (theme === root.dataset.theme) return;
    root.dataset.theme = root.style.colorScheme = theme;
    for (const rule of dark) rule.media.mediaText = theme === "dark" ? "all" : "not all";
    dispatchEvent(new Event("themechange"));
  });
})();
