import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// The gateway serves what is built; `npx vite` asks a gateway on its default port.
export default defineConfig({
  plugins: [react()],
  build: {
    outDir: "../cxr_portal/static",
    emptyOutDir: true,
    // The strict policy of the gateway takes no data: URLs.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8090" } },
});
