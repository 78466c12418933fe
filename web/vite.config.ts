// Builds the page into the Python package, where `openbook serve` finds it. Run it by `make web`.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { defineConfig, type Plugin } from "vite";

const HERE = import.meta.dirname;

/** Browsers from early 2024 on: `light-dark()`, nesting and popovers as they are written. */
const BROWSERS = ["chrome123", "edge123", "firefox125", "safari17.5"];

/** What the build is made from. tests/browser/test_build.py computes the same digest of the same files. */
function digestOfSources(): string {
  const top = readdirSync(HERE).filter((name) => /\.(json|html|ts)$/.test(name));
  const below = ["src", "public"].flatMap((folder) =>
    readdirSync(join(HERE, folder), { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => relative(HERE, join(entry.parentPath, entry.name)).replaceAll(sep, "/")),
  );
  const digest = createHash("sha256");
  for (const file of [...top, ...below].sort()) {
    const content = createHash("sha256")
      .update(readFileSync(join(HERE, file)))
      .digest("hex");
    digest.update(`${file}\n${content}\n`);
  }
  return digest.digest("hex");
}

/** Leaves the digest of its sources in the build, so that a test can tell an old one. */
function stamp(): Plugin {
  return {
    name: "stamp",
    generateBundle() {
      const source = `${JSON.stringify({ sources: digestOfSources() })}\n`;
      this.emitFile({ type: "asset", fileName: "build.json", source });
    },
  };
}

/** KaTeX names each font in three formats; every browser that runs this page reads the first. */
function woff2Only(): Plugin {
  return {
    name: "woff2-only",
    enforce: "pre",
    transform(code, id) {
      if (!/katex.*\.css/.test(id)) return null;
      return code.replace(/,\s*url\([^)]*\.(?:woff|ttf)\)\s*format\([^)]*\)/g, "");
    },
  };
}

/** Vite lists the licences of bundled scripts; the font comes in by a style sheet, so its own is added. */
function fontLicence(): Plugin {
  return {
    name: "font-licence",
    generateBundle() {
      const source = readFileSync(join(HERE, "node_modules/@fontsource-variable/literata/LICENSE"), "utf8");
      this.emitFile({ type: "asset", fileName: "licences-fonts.txt", source });
    },
  };
}

export default defineConfig({
  base: "./", // works under any path of a reverse proxy
  plugins: [woff2Only(), fontLicence(), stamp()],
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../src/openbook/server/web",
    emptyOutDir: true,
    target: BROWSERS,
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0, // a font inside a style sheet would need `data:` in the policy
    license: { fileName: "licences.md" },
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000" } },
});
