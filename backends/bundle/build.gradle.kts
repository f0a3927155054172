// This directory is an Android library module: include it in settings.gradle.kts, and depend on it.
plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "org.graphwright"
    compileSdk = 35
    defaultConfig {
        minSdk = 24
        ndk { abiFilters += "arm64-v8a" }
    }
    sourceSets["main"].apply {
        manifest.srcFile("AndroidManifest.xml")
        kotlin.setSrcDirs(listOf("."))
        kotlin.include("Model.kt")
    }
    // CMake links the library against libmodel.so, and Gradle packs what it links.
    externalNativeBuild { cmake { path = file("CMakeLists.txt") } }
}
